"""Captions: by transformers and by vLLM, which is a stand-in here, the same manifest."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from support.captioning import change_json, make_llava, put_vllm
from support.preparation import BOX, dropped_of, make_photo, make_staged, rows_of, write_table

from trainer import prepare as command
from trainer.config import PrepareSettings
from trainer.config.preparation import CaptionSettings
from trainer.errors import TrainerError
from trainer.preparation import on_ray
from trainer.preparation.captions import Caption, choose_backend

QUICK = ("mask.parser=ellipse", "sheet=0", "caption.most_tokens=6")
FILES = ("manifest.jsonl", "dropped.jsonl", "summary.json", "progress.jsonl")


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def table(tmp_path) -> Path:
    """Seven photos, the third with a caption of its own and the last too small to be kept."""
    rows = [{"path": str(make_photo(tmp_path / f"photos/{n}.png", n)), "bbox": BOX, "id": str(n)} for n in range(7)]
    rows[2]["caption"], rows[6]["bbox"] = "as it is", [50, 30, 70, 50]
    return write_table(tmp_path / "photos/table.jsonl", rows)


def settings_of(table, output, llava, *settings: str, device: str = "cuda") -> PrepareSettings:
    """Settings whose captions are written on a device that need not be here."""
    every = (*QUICK, f"caption.model={llava}", *settings)
    loaded = PrepareSettings.load(None, every, photos=str(table), output=str(output))
    return loaded.model_copy(update={"caption": loaded.caption.model_copy(update={"device": device})})


def run(*arguments, **keywords) -> dict:
    return command.prepare(settings_of(*arguments, **keywords), False)


def caption_of(output: Path) -> dict[str, str]:
    return {row["id"]: row["caption"] for row in rows_of(output)}


def is_photo(number: int):
    """Whether a picture is that one of the table."""
    return lambda picture: make_staged(seed=number).picture.getpixel((0, 0)) == picture.getpixel((0, 0))


def test_vllm_makes_the_manifest_that_transformers_makes(table, tmp_path, llava, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    run(table, tmp_path / "plain", llava, "batch_size=4", "caption.backend=transformers", device="cpu")
    calls = put_vllm(monkeypatch)
    run(table, tmp_path / "vllm", llava, "batch_size=4", "caption.max_model_len=512")
    for name in FILES:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "vllm" / name).read_bytes(), name
    found = caption_of(tmp_path / "vllm")
    assert found["2"] == "as it is" and len(set(found.values())) > 3 and all(found.values())
    assert {row.get("captioned_by") for row in rows_of(tmp_path / "vllm")} == {"llava", None}
    # One engine, and one call a batch, without the photos that need none.
    assert [len(prompts) for prompts, _ in calls] == [3, 2]
    assert calls.engines == [
        {
            "model": str(llava),
            "dtype": "auto",
            "gpu_memory_utilization": 0.8,
            "max_model_len": 512,
            "limit_mm_per_prompt": {"image": 1},
        }
    ]
    assert {prompt["prompt"] for prompts, _ in calls for prompt in prompts} == {
        "USER: <image> Describe this photo in one sentence. ASSISTANT:"
    }
    assert "captions by transformers on cpu" in caplog.text and caplog.text.count("captions by vllm on cuda\n") == 1


def test_batches_may_come_back_in_any_order(table, tmp_path, llava, monkeypatch):
    put_vllm(monkeypatch)
    run(table, tmp_path / "here", llava, "batch_size=2")
    seen = []

    def work(make, arguments, batches, workers, gpus):
        seen.append((arguments[0].caption.backend, gpus))
        return [make(*arguments)(batch) for batch in reversed(batches)]

    monkeypatch.setattr(on_ray, "work", work)
    run(table, tmp_path / "ray", llava, "batch_size=2", "runner=ray", "workers=3")
    # The choice is made once, for all machines; an actor has a GPU to itself.
    assert seen == [("vllm", 1.0)]
    for name in FILES[:3]:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()


def test_stages_that_see_no_photo_start_no_engine(table, tmp_path, llava, monkeypatch):
    """Those of the process that hands out the work: the engine would take the GPU from the actors."""
    calls = put_vllm(monkeypatch)
    settings = settings_of(table, tmp_path / "out", llava, "caption.backend=vllm", "runner=ray")
    command.Pipeline(choose_backend(settings), tmp_path, False, False)
    assert calls.engines == []


@pytest.mark.parametrize("error", [None, ValueError], ids=["its own error", "ValueError of earlier versions"])
@pytest.mark.parametrize("missing", ["keep", "drop"])
def test_photo_that_is_refused_costs_itself_alone(table, tmp_path, llava, monkeypatch, caplog, error, missing):
    put_vllm(monkeypatch)
    run(table, tmp_path / "whole", llava)
    whole = caption_of(tmp_path / "whole")
    arguments = {} if error is None else {"error": error}
    calls = put_vllm(monkeypatch, refuses=is_photo(1), **arguments)
    run(table, tmp_path / "out", llava, f"caption.missing={missing}")
    wanted = {**whole, "1": ""}
    if missing == "drop":
        del wanted["1"]
    assert caption_of(tmp_path / "out") == wanted
    dropped = {"6": "small face"} | ({"1": "no caption"} if missing == "drop" else {})
    assert dropped_of(tmp_path / "out") == dropped
    told = caplog.text if missing == "keep" else (tmp_path / "out/dropped.jsonl").read_text()
    assert "caption.model refuses it: 'the picture is too long'" in told
    calls.clear()
    run(table, tmp_path / "out", llava, f"caption.missing={missing}")
    assert not calls and dropped_of(tmp_path / "out") == dropped  # not asked again


def test_model_that_refuses_every_picture_stops_the_run(table, tmp_path, llava, monkeypatch):
    put_vllm(monkeypatch, refuses=lambda picture: True)
    with pytest.raises(TrainerError, match=r"caption\.model .*llava: refuses a plain grey picture too"):
        run(table, tmp_path / "out", llava)
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_photo_that_transformers_refuses_costs_itself_alone(llava, monkeypatch):
    stage = Caption(CaptionSettings(model=str(llava), most_tokens=6))
    photos, again = [[make_staged(seed=seed) for seed in range(3)] for _ in range(2)]
    stage(photos)
    describe = stage.model.describe

    def refuse(pictures):
        if any(map(is_photo(1), pictures)):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return describe(pictures)

    monkeypatch.setattr(stage.model, "describe", refuse)
    stage(again)
    assert [photo.row["caption"] for photo in again] == [photos[0].row["caption"], "", photos[2].row["caption"]]
    assert [bool(photo.detail) for photo in again] == [False, True, False]


def test_vllm_that_is_not_there_stops_before_any_photo(table, tmp_path, llava, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(command, "Pipeline", lambda *_: pytest.fail("began to work"))
    with pytest.raises(
        TrainerError, match=r"caption\.backend=vllm: it is not installed: pip install 'feedface\[vllm\]'"
    ):
        run(table, tmp_path / "out", llava, "caption.backend=vllm")


REASONS = [
    ((), {"device": "cpu"}, {}, "it takes the first GPU, caption.device=cuda, and caption.device is cpu"),
    ((), {"device": "cuda:1"}, {}, "caption.device is cuda:1"),
    (("workers=2",), {}, {}, "each of workers=2 would start an engine on one GPU; take workers=1, or runner=ray"),
    ((), {}, {"architectures": ("LlamaForCausalLM",)}, "it does not know LlavaForConditionalGeneration"),
]


@pytest.mark.parametrize(("settings", "device", "vllm", "why"), REASONS)
def test_why_vllm_is_not_taken(table, tmp_path, llava, monkeypatch, caplog, settings, device, vllm, why):
    caplog.set_level(logging.INFO)
    put_vllm(monkeypatch, **vllm)
    chosen = choose_backend(settings_of(table, tmp_path, llava, *settings, **device))
    assert chosen.caption.backend == "transformers" and why in caplog.text
    with pytest.raises(TrainerError) as error:
        choose_backend(settings_of(table, tmp_path, llava, "caption.backend=vllm", *settings, **device))
    assert "caption.backend=vllm: " in str(error.value) and why in str(error.value)


def test_vllm_decodes_as_the_model_asks_for(table, tmp_path, monkeypatch):
    """transformers goes by the model's generation_config.json, and vLLM takes of it what it has."""
    calls, folder = put_vllm(monkeypatch), make_llava(tmp_path / "llava")
    change_json(folder / "generation_config.json", repetition_penalty=1.5)
    run(table, tmp_path / "vllm", folder)
    assert {decoding.repetition_penalty for _, decoding in calls} == {1.5}
    assert {decoding.max_tokens for _, decoding in calls} == {6}
    change_json(folder / "generation_config.json", num_beams=3)
    settings = settings_of(table, tmp_path, folder)
    assert choose_backend(settings).caption.backend == "transformers"
    (folder / "generation_config.json").unlink()
    assert choose_backend(settings).caption.backend == "vllm"


def test_engine_that_does_not_start(table, tmp_path, llava, monkeypatch):
    put_vllm(monkeypatch)

    def fail(**_):
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", fail)
    with pytest.raises(TrainerError, match="caption.backend=vllm: no engine for .*Engine core initialization failed"):
        run(table, tmp_path / "out", llava)


@pytest.mark.parametrize("content", ["{}", '{"model_type": "bert"}', "{"], ids=["nothing", "text", "damaged"])
@pytest.mark.parametrize("backend", ["auto", "vllm", "transformers"])
def test_folder_without_such_a_model(table, tmp_path, llava, monkeypatch, backend, content):
    put_vllm(monkeypatch)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    device = "cpu" if backend == "transformers" else "cuda"
    with pytest.raises(TrainerError, match="caption.model .*other: not an image-to-text model"):
        run(table, tmp_path / "out", folder, f"caption.backend={backend}", device=device)


def test_captions_come_from_a_model_for_photos_without_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "man", "woman", "smiling"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), bos_token="[DEC]")
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BlipConfig(
        text_config={
            **small,
            "vocab_size": 10,
            "bos_token_id": 5,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "encoder_hidden_size": 16,
            "max_position_embeddings": 32,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
    )
    model = transformers.BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.decoder.bias[words.index("smiling")] = 9.0
    model.save_pretrained(tmp_path)
    stage = Caption(CaptionSettings(model=str(tmp_path), most_tokens=4))
    bare, given = make_staged(), make_staged()
    given.given["caption"] = "as it is"
    stage([bare, given])
    assert bare.row["captioned_by"] == tmp_path.name
    assert set(bare.row["caption"].split()) == {"smiling"}
    assert "caption" not in given.row
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(TrainerError, match="not an image-to-text model"):
        Caption(CaptionSettings(model=str(tmp_path)))
