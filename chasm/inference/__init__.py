"""Use a trained model: predict responses to images, export it, draw maps."""

from chasm.inference.encoder import Encoder, Prediction

__all__ = ["Encoder", "Prediction"]
