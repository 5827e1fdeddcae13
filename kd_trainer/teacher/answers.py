"""How a training asks its teacher: a copy that has less to do, on a stream of its own if wanted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kd_trainer.fast_layers import folded
from kd_trainer.teacher.network import Teacher

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def state_of(teacher: Teacher) -> tuple[tuple[int, int], ...]:
    """What changes when somebody writes into a teacher's tensors; reads no value."""
    tensors = (*teacher.network.parameters(), *teacher.network.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


class Answers:
    """Asks a copy of the teacher that was made for this training, and leaves the teacher alone.

    The copy is made at the first question, and again when the teacher has changed; a run that never
    asks has none. It is no part of the teacher, whose weights a run is recognised by.

    Args:
        teacher: on the device where it is to answer.
        precision: of the autocast under which it will be asked: bf16, fp16, or else fp32.
        fold: multiply BatchNorms into convolutions and cast weights once.
        backend: of torch.compile, or None.
        stream: answer on a CUDA stream of its own; callers then `join` before they read.

    Attributes:
        asked: the teacher that answers; None before the first question.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        precision: str,
        fold: bool = True,
        backend: str | None = None,
        stream: bool = False,
    ) -> None:
        self.teacher = teacher
        self.fold = fold
        self.backend = backend
        self._type = _TYPES.get(precision, torch.float32)
        self._stream = torch.cuda.Stream() if stream else None
        self.asked: Teacher | None = None
        self._made_of: tuple[tuple[int, int], ...] = ()

    def _prepare(self, pixel_values: Tensor) -> Teacher:
        if not self.fold and self.backend is None:
            return self.teacher
        other = copy.copy(self.teacher)
        other._modules = dict(self.teacher._modules)
        network: Any = self.teacher.network
        if self.fold:
            network = folded(network, self._type, self._picture(pixel_values))
        if self.backend is not None:
            network = torch.compile(network, backend=self.backend)
        other.network = network
        return other

    def _picture(self, pixel_values: Tensor) -> Tensor:
        """What the network gets of the first picture: of its own size and normalisation."""
        seen: list[Tensor] = []
        handle = self.teacher.network.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            with torch.autocast(pixel_values.device.type, enabled=False):
                self.teacher(pixel_values[:1])
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def ask(self, pixel_values: Tensor) -> Tensor:
        """Logits fp32 (B, K, H, W) of normalised pictures (B, 3, H, W).

        Call it under the autocast that was named. With a stream of its own the logits may not be
        computed yet: see `join`.
        """
        state = state_of(self.teacher)
        if self.asked is None or state != self._made_of:
            self.asked, self._made_of = self._prepare(pixel_values), state
        teacher = self.asked
        if self._stream is None:
            return teacher(pixel_values)
        # Not run yet on any GPU. The pictures come from the current stream; neither side may give
        # memory back that the other still reads.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logits: Tensor = teacher(pixel_values)
        pixel_values.record_stream(self._stream)
        return logits

    def join(self, logits: Tensor | None) -> Tensor | None:
        """Let the current stream wait for an answer; nothing to do without a stream of its own."""
        if self._stream is not None and logits is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            logits.record_stream(torch.cuda.current_stream())
        return logits
