"""Calibration: contrasting prompts → recorded sums → directions → planes and mask → a Steering → its sites and dial."""

from edge_steer.calibration.classes import passes
from edge_steer.calibration.steering import calibrate
from edge_steer.calibration.sums import ClassSums, Recorder
from edge_steer.choices import Mask

__all__ = ["ClassSums", "Mask", "Recorder", "calibrate", "passes"]
