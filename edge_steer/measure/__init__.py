"""What an angle does: effect and damage, measured on the model that runs."""
