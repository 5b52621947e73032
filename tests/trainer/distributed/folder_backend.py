"""A backend of transformers in place of vLLM: it loads the folder that vLLM would load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from xopd.models import SpeechLM
from xopd.sections import Dtype
from xopd.vllm.answers import Generated, checked
from xopd.vllm.engine import Call, Sampling
from xopd.vllm.folder import write_folder, write_weights
from xopd.vllm.sync import Fingerprint, LanguageModel, check_fingerprint
from xopd.vllm.worker import Fingerprints


class FolderBackend:
    """The language model that was written for vLLM, run by transformers token by token."""

    def __init__(self, student: SpeechLM, folder: Path) -> None:
        self.folder, self.model, self.label = folder, cast(Any, None), ""
        self.loads = True  # False: it takes no notice of new weights
        self.bias = 0.0  # of the log-probs that it reports
        write_folder(student, folder, Dtype.FP32)

    def load(self, weights: LanguageModel, version: int) -> None:
        if self.loads:
            write_weights(weights, self.folder)
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.label = str(version)

    def check(self, expected: dict[str, Fingerprint], version: int) -> None:
        assert self.label == str(version)
        worker = Fingerprints()
        worker.model_runner = self
        found = worker.xopd_fingerprint('["' + '", "'.join(expected) + '"]')
        check_fingerprint(expected, [found])

    def get_model(self) -> Any:
        return self.model

    @torch.no_grad()
    def generate(self, calls: Sequence[Call], sampling: Sampling) -> list[Generated]:
        return [self._one(call, sampling) for call in calls]

    def _one(self, call: Call, sampling: Sampling) -> Generated:
        generator = torch.Generator().manual_seed(call.seed)
        embed = self.model.get_input_embeddings()
        given = call.embeds
        rows = embed(torch.tensor(call.prompt_ids)) if given is None else given
        ids: list[int] = []
        logprob: list[float] = []
        while len(ids) < sampling.max_tokens and sampling.eos_id not in ids:
            logits = self.model(inputs_embeds=rows[None]).logits[0, -1] / sampling.temperature
            logits[list(sampling.reserved)] = -torch.inf
            scores = logits.log_softmax(-1)
            token = int(torch.multinomial(scores.exp(), 1, generator=generator))
            ids.append(token)
            logprob.append(float(scores[token]) + self.bias)
            rows = torch.cat([rows, embed(torch.tensor([token]))])
        reason = "stop" if ids[-1] == sampling.eos_id else "length"
        return checked(sampling.wanted(call), ids, logprob, reason)

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass
