"""Language models as pure functions of their parameters, and functions that read and write Hugging Face folders."""

from kd_jax.models.config import ModelConfig
from kd_jax.models.fingerprint import fingerprint
from kd_jax.models.folders import check_folder
from kd_jax.models.functional import Model, Shardings, from_config, take_layers
from kd_jax.models.generate import generate, left_pad
from kd_jax.models.huggingface import load_config, load_pretrained
from kd_jax.models.huggingface_save import save_pretrained
from kd_jax.models.int8 import dequantise
from kd_jax.models.paths import PACKAGED, folder, model_folder
from kd_jax.models.trained import HEAD_OF, Chosen, Lora, Part

__all__ = [
    "HEAD_OF",
    "PACKAGED",
    "Chosen",
    "Lora",
    "Model",
    "ModelConfig",
    "Part",
    "Shardings",
    "check_folder",
    "dequantise",
    "fingerprint",
    "folder",
    "from_config",
    "generate",
    "left_pad",
    "load_config",
    "load_pretrained",
    "model_folder",
    "save_pretrained",
    "take_layers",
]
