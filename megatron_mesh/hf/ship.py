"""The code that an export carries: copies of our own source, with imports as Hugging Face wants them."""

from pathlib import Path

import megatron_mesh
from megatron_mesh import recurrence
from megatron_mesh.hf import configuration_mesh, layers_mesh, modeling_mesh

AUTO_MAP = {
    "AutoConfig": "configuration_mesh.MeshConfig",
    "AutoModel": "modeling_mesh.MeshModel",
    "AutoModelForCausalLM": "modeling_mesh.MeshForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mesh.MeshForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mesh.MeshForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_mesh.MeshForQuestionAnswering",
}
# transformers copies the files that a model's code names in ``from .name import``, from one flat directory.
_PACKAGES = ("from megatron_mesh.hf.", "from megatron_mesh.recurrence.")


def sources() -> dict[str, str]:
    """File name and text of every shipped file."""
    here = [Path(str(module.__file__)) for module in (configuration_mesh, layers_mesh, modeling_mesh)]
    maths = Path(str(recurrence.__file__)).parent.glob("[!_]*.py")
    return {path.name: _flat(path.read_text(encoding="utf-8")) for path in [*here, *sorted(maths)]}


def _flat(text: str) -> str:
    for package in _PACKAGES:
        text = text.replace(package, "from .")
    return f"# Part of megatron_mesh {megatron_mesh.__version__} (Apache-2.0).\n{text}"
