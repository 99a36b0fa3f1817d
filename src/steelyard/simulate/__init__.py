"""A small world with a known gold reward, and simulated annotators with three kinds of noise."""

from steelyard.simulate.annotators import AnnotatorConfig, Truth, annotate
from steelyard.simulate.world import gold
from steelyard.simulate.write import WorldConfig, write_world
from steelyard.simulate.writer import Writer

__all__ = ["AnnotatorConfig", "Truth", "WorldConfig", "Writer", "annotate", "gold", "write_world"]
