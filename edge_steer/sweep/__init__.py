"""What every position of the dial does, and how far it may go."""
