"""Code of the card. A test runs it as it stands, in a process without kd_trainer."""

from __future__ import annotations

from kd_trainer.model_card.facts import CardFacts

_PIPELINE = """\
```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{id}", trust_remote_code=True)
for number, part in enumerate(segment("photograph.jpg")):
    name = "".join(c if c.isalnum() else "_" for c in part["label"])
    part["mask"].save(f"{{number}}_{{name[:50]}}.png")
```"""

_AUTO = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("{id}", trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained("{id}", trust_remote_code=True)

image = Image.open("photograph.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(classes,) = processor.post_process_semantic_segmentation(
    outputs, target_sizes=[(image.height, image.width)]
)
```"""

_SMP = """\
```python
import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image

network = smp.from_pretrained("{id}").eval()
image = Image.open("photograph.jpg").convert("RGB").resize(({side}, {side}), Image.BILINEAR)
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
mean = torch.tensor({mean}).view(1, 3, 1, 1)
std = torch.tensor({std}).view(1, 3, 1, 1)
with torch.no_grad():
    logits = network((pixels - mean) / std)
{decision}
```"""

_ONE_LOGIT = "mask = logits[0, 0].sigmoid() > 0.5"
_CLASSES = "mask = logits[0].argmax(dim=0)"


def usage(facts: CardFacts) -> str:
    """How to use the student with a pipeline, with Auto classes and with smp."""
    parts = [
        "## Use",
        "With a pipeline, which gives one mask of the picture's size for each class it finds:",
        _PIPELINE.format(id=facts.repo_id),
        "With the Auto classes; `classes` is a tensor (height, width) of class ids:",
        _AUTO.format(id=facts.repo_id),
        "`trust_remote_code=True` runs the Python files of this repository. Where kd_trainer is "
        "installed, import it and leave the argument out. Either needs transformers 5.4 or newer; "
        "5.4, 5.8, 5.15, 5.23 and 5.24 were tried.",
    ]
    if facts.read_by_smp:
        parts += [
            "With segmentation_models_pytorch alone, which needs no code from here:",
            _smp(facts),
        ]
    else:
        parts.append(
            f"`smp.from_pretrained` does not read this repository: its loader of `{facts.encoder}` "
            "refuses the further keys in config.json that transformers needs."
        )
    return "\n\n".join(parts)


def _smp(facts: CardFacts) -> str:
    return _SMP.format(
        id=facts.repo_id,
        side=facts.side,
        mean=[float(value) for value in facts.config["image_mean"]],
        std=[float(value) for value in facts.config["image_std"]],
        decision=_ONE_LOGIT if facts.config["classes"] == 1 else _CLASSES,
    )
