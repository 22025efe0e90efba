"""Few-shot tasks: glyphs and sinusoids, which are part of the package, published data sets, and your own images."""

from maml_cuda.data import benchmarks, images
from maml_cuda.data.episodes import Episodes
from maml_cuda.data.glyphs import GlyphTasks
from maml_cuda.data.image_tasks import ImageBatches, ImageTasks
from maml_cuda.data.meta_batch import MetaBatch
from maml_cuda.data.pictures import Pictures
from maml_cuda.data.ragged import RaggedBatch, collate
from maml_cuda.data.sinusoid import SinusoidTasks

__all__ = [
    "Episodes",
    "GlyphTasks",
    "ImageBatches",
    "ImageTasks",
    "MetaBatch",
    "Pictures",
    "RaggedBatch",
    "SinusoidTasks",
    "benchmarks",
    "collate",
    "images",
]
