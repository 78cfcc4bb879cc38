"""The transformer's output when only its later layers change: what comes before them is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .evaluation import Inputs


@dataclass
class _State:
    """What the layers give up to where one begins: ``joint``, the last joint block's, and ``single``, the last single
    block's, each None where none is passed over."""

    joint: tuple[torch.Tensor, torch.Tensor] | None = None
    single: torch.Tensor | None = None


class _Given(torch.nn.Module):
    """In place of the blocks that are passed over."""

    def __init__(self, output: object):
        super().__init__()
        self.output = output

    def forward(self, **_) -> object:
        return self.output


class Resumed:
    """Outputs of a model from one of its layers on.

    Args:
        model: diffusers' transformer; its blocks are taken out while an output is computed, and put back.
        inputs: what it runs on.

    Attributes:
        layers: how many there are, joint and single together.
    """

    def __init__(self, model: torch.nn.Module, inputs: Inputs):
        self._model, self._inputs = model, inputs
        self._joint, self._single = model.joint_transformer_blocks, model.single_transformer_blocks
        self._evaluations = inputs.source.evaluations(model.config.joint_attention_dim)
        self._states = [_State() for _ in self._evaluations]
        self._start = 0
        self.layers = len(self._joint) + len(self._single)

    @torch.inference_mode()
    def start_at(self, layer: int) -> None:
        """Compute outputs from ``layer`` on, as long as nothing before it changes; not before the layer of now."""
        if layer == self._start:
            return
        blocks = [*self._joint, *self._single]
        states = []
        for evaluation, state in zip(self._evaluations, self._states, strict=True):
            new = _State(state.joint, state.single)

            def keep_joint(_, __, output, new=new):
                new.joint = output

            def keep_single(_, __, output, new=new):
                new.single = output

            last_joint = min(layer, len(self._joint)) - 1
            handles = []
            if last_joint >= self._start:
                handles.append(blocks[last_joint].register_forward_hook(keep_joint))
            if layer > len(self._joint):
                handles.append(blocks[layer - 1].register_forward_hook(keep_single))
            try:
                self._output(evaluation, state)
            finally:
                for handle in handles:
                    handle.remove()
            states.append(new)
        self._start, self._states = layer, states

    @torch.inference_mode()
    def outputs(self) -> list[torch.Tensor]:
        """The output ``(1, 4, height, width)`` of each evaluation."""
        return [
            self._output(evaluation, state) for evaluation, state in zip(self._evaluations, self._states, strict=True)
        ]

    def _output(self, evaluation, state: _State) -> torch.Tensor:
        with self._passing_over(state):
            return self._inputs.output(self._model, evaluation)

    @contextmanager
    def _passing_over(self, state: _State) -> Iterator[None]:
        joint, single = self._joint, self._single
        if state.joint is not None:
            joint = [_Given(state.joint), *joint[min(self._start, len(joint)) :]]
        if state.single is not None:
            single = [_Given(state.single), *single[self._start - len(self._joint) :]]
        self._model.joint_transformer_blocks = torch.nn.ModuleList(joint)
        self._model.single_transformer_blocks = torch.nn.ModuleList(single)
        try:
            yield
        finally:
            self._model.joint_transformer_blocks, self._model.single_transformer_blocks = self._joint, self._single
