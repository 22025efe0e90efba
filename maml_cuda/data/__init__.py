"""Few-shot tasks that ship with the package: glyph classification and sinusoid regression."""

from maml_cuda.data.glyphs import GlyphTasks
from maml_cuda.data.meta_batch import MetaBatch
from maml_cuda.data.sinusoid import SinusoidTasks

__all__ = ["GlyphTasks", "MetaBatch", "SinusoidTasks"]
