"""Calibration: contrasting prompts → recorded sums → directions → planes and mask → a Steering → its sites and dial."""

from edge_steer.calibrate.planes import Mask
from edge_steer.calibrate.steering import calibrate, passes
from edge_steer.calibrate.sums import ClassSums, Recorder

__all__ = ["ClassSums", "Mask", "Recorder", "calibrate", "passes"]
