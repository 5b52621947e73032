"""Models: audio token counts, save and load, freezing, and errors that name the remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    _get_feat_extract_output_lengths,
)

from xopd.models import SpeechLM, TextLM, load_student, load_teacher
from xopd.models.demo import build_student, build_teacher, copy_language_model
from xopd.models.prompting import speech_prompt, text_prompt
from xopd.models.speech_lm import ModelError, audio_token_count, leaf_modules
from xopd.run import save_speech_lm
from xopd.types import Prompt


def test_audio_token_count_is_that_of_transformers() -> None:
    frames = torch.arange(1, 1501)
    expected = _get_feat_extract_output_lengths(frames).tolist()
    assert [audio_token_count(n) for n in frames.tolist()] == expected


def test_audio_embeddings_do_not_depend_on_the_batch(student: SpeechLM) -> None:
    generator = np.random.default_rng(0)
    # 7 and 101 frames: a short rest and a rest of one frame behind a full window.
    clips = [generator.normal(size=(64, n)).astype(np.float32) for n in (7, 101, 260)]
    with torch.no_grad():
        together = student.encode_audio(clips)
        for clip, found in zip(clips, together, strict=True):
            (alone,) = student.encode_audio([clip])
            assert found.shape == (audio_token_count(clip.shape[1]), 128)
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_save_and_load_are_exact(
    student: SpeechLM, teacher: TextLM, prompts: list[Prompt], tmp_path: Path
) -> None:
    save_speech_lm(student, tmp_path / "student")
    loaded = load_student(str(tmp_path / "student"))
    before, after = student.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.reserved_ids == student.reserved_ids
    assert (loaded.audio_id, loaded.eos_id) == (student.audio_id, student.eos_id)
    assert loaded.feature_extractor.to_dict() == student.feature_extractor.to_dict()
    assert text_prompt(loaded.tokenizer, prompts[0].text) == prompts[0].text_ids
    assert not list((tmp_path / "student").glob("*.bin"))
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    again = load_teacher(str(tmp_path / "teacher"))
    assert not any(p.requires_grad for p in again.model.parameters())
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_the_tower_is_frozen_and_the_language_model_is_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    student = build_student(tokenizer, 1)
    student.freeze_all_but_language_model()
    (tower,) = leaf_modules(student.model, ["audio_tower"])
    (vision,) = leaf_modules(student.model, ["visual"])
    frozen = {id(p) for module in (tower, vision) for p in module.parameters()}
    assert frozen
    for name, parameter in student.model.named_parameters():
        assert parameter.requires_grad != (id(parameter) in frozen), name
    trained = sum(p.numel() for p in student.trainable().values())
    assert trained == sum(p.numel() for p in build_teacher(tokenizer, 0).parameters())


def test_a_model_without_a_known_tower_is_refused(student: SpeechLM, teacher: TextLM) -> None:
    towerless = replace(student, model=teacher.model)
    with pytest.raises(ModelError, match="no audio tower in Qwen3ForCausalLM"):
        towerless.freeze_all_but_language_model()
    teacher.model.requires_grad_(False)


def test_the_qwen3_language_model_fits_the_thinker(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    model, student = build_teacher(tokenizer, 3), build_student(tokenizer, 4)
    copy_language_model(model, student)
    ids = torch.tensor([prompts[0].text_ids])
    position = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=position).logits
        found = student.model(
            inputs_embeds=student.embed(ids, []), position_ids=position, use_cache=False
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load", [load_student, load_teacher])
def test_a_folder_without_a_model_is_refused(load: object, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path("./absent")):
        with pytest.raises(ModelError, match=r"has no config\.json; is the path right"):
            load(f"./{path}" if path == Path("absent") else str(path))


def test_another_architecture_is_refused(teacher: TextLM, tmp_path: Path) -> None:
    teacher.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model_type 'qwen3'; supported: 'qwen3_omni"):
        load_student(str(tmp_path))


def test_weights_that_are_not_safetensors_are_refused(teacher: TextLM, tmp_path: Path) -> None:
    teacher.model.save_pretrained(tmp_path)
    teacher.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_teacher(str(tmp_path))


def test_two_meanings_of_eos_are_refused(student: SpeechLM, tmp_path: Path) -> None:
    save_speech_lm(student, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["eos_token_id"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.eos_token_id 4 differs from the tokenizer's 1"):
        _ = load_student(str(tmp_path)).eos_id


def test_a_head_that_is_no_linear_layer_is_refused(new_student: SpeechLM) -> None:
    new_student.model.set_output_embeddings(nn.Identity())
    with pytest.raises(ModelError, match=r"has no nn\.Linear lm_head"):
        _ = new_student.lm_head


def test_audio_of_another_clip_is_refused(student: SpeechLM, prompts: list[Prompt]) -> None:
    prompt = prompts[0]
    with pytest.raises(ModelError, match=r"audio placeholders for .* audio embeddings"):
        student.embed(torch.tensor([prompt.speech_ids]), [prompt.audio[:-1]])


def test_prompt_forms(student: SpeechLM) -> None:
    tokenizer = student.tokenizer

    def words(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(ids))

    assert words(text_prompt(tokenizer, "add one")) == "<bos> <user> add one <assistant>"
    spoken = "<bos> <user> <audio_start> <audio> <audio> <audio_end>"
    assert words(speech_prompt(tokenizer, student.audio_id, 2)) == f"{spoken} <assistant>"
    asked = speech_prompt(tokenizer, student.audio_id, 2, "who speaks")
    assert words(asked) == f"{spoken} who speaks <assistant>"
    with pytest.raises(ModelError, match="rendered 0 audio placeholders"):
        speech_prompt(tokenizer, 99, 2)
