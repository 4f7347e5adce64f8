"""The stages of preparing photos, one by one, and where photos come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from feedface_core.faces import DetectedFace, clamp_square
from trainer.config.preparation import (
    CaptionSettings,
    CropSettings,
    DetectSettings,
    FilterSettings,
    IdentitySettings,
    MaskSettings,
)
from trainer.errors import TrainerError
from trainer.preparation.captions import Caption
from trainer.preparation.faces import Crop, Filter, Mask, sharpness
from trainer.preparation.identities import cluster, compares_faces, identify, named_identity
from trainer.preparation.inputs import find_photos
from trainer.preparation.photo import Photo
from trainer.preparation.recognisers import Recognise, load_recogniser

BOX = [50, 30, 110, 90]


# --- inputs ----------------------------------------------------------------------------------------------


def test_folders_globs_and_caption_files(tmp_path):
    for name in ("ann/1.png", "ann/2.JPG", "bob/1.png", ".hidden.png", "out/crops/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "ann/1.txt").write_text("\ufeff写真,\n two lines ", encoding="utf-8")
    (tmp_path / "notes.md").touch()
    photos, root = find_photos(str(tmp_path), tmp_path / "out")
    assert root == tmp_path and [photo.id for photo in photos] == ["ann/1.png", "ann/2.JPG", "bob/1.png"]
    assert photos[0].given == {"caption": "写真, two lines"} and photos[1].given == {}
    photos, root = find_photos(str(tmp_path / "*/1.png"))
    assert [photo.id for photo in photos] == ["ann/1.png", "bob/1.png"]
    photos, root = find_photos(str(tmp_path / "ann/*.png"))
    assert root == tmp_path / "ann" and [photo.id for photo in photos] == ["1.png"]
    (tmp_path / "ann/1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainerError, match="1.txt: the caption is not UTF-8"):
        find_photos(str(tmp_path))


def test_output_beside_the_photos_is_not_taken_for_photos(tmp_path):
    for name in ("1.png", "crops/1-abc.png", "masks/1-abc.png", "contact_sheet.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [photo.id for photo in find_photos(str(tmp_path), tmp_path)[0]] == ["1.png"]


@pytest.mark.parametrize(
    ("settings", "id_", "given", "expected", "compared"),
    [
        ({}, "ann/1.png", {}, None, True),  # a sub-folder may be anything
        ({}, "1.png", {}, None, False),
        ({}, "ann/1.png", {"identity": "carl"}, "carl", False),
        ({"pattern": r"(.+)_\d+"}, "ann/bob_3.png", {}, "bob", False),
        ({"pattern": r"(.+)_\d+"}, "ann/3.png", {}, None, False),
        ({"source": "folder"}, "ann/1.png", {"identity": "carl"}, "ann", False),
        ({"source": "given"}, "ann/1.png", {}, None, False),
        ({"source": "none"}, "ann/1.png", {"identity": "carl"}, None, False),
        ({"source": "cluster"}, "ann/1.png", {"identity": "carl"}, None, True),
    ],
)
def test_identity_by_name(settings, id_, given, expected, compared):
    photo, own = Photo(id_, Path(id_), given), IdentitySettings(**settings)
    assert named_identity(photo, own)[0] == expected and compares_faces(photo, own) == compared


def make_folder(name: str, people: str, seed: int = 0) -> list[Photo]:
    """A photo for each letter; the same letter is the same person, a dot is a face that was not recognised."""
    random = np.random.default_rng(seed)
    photos = [Photo(f"{name}/{place}.png", Path(f"{name}/{place}.png")) for place in range(len(people))]
    for photo, letter in zip(photos, people, strict=True):
        centre = np.random.default_rng(ord(letter)).normal(0, 1, 128)
        noisy = centre / np.linalg.norm(centre) + random.normal(0, 0.02, 128)
        photo.vector = [] if letter == "." else noisy.tolist()
    return photos


@pytest.mark.parametrize(
    ("faces", "expected"),
    [
        ("aaaa", "xxxx"),
        ("aa", "xx"),
        ("ab", "--"),
        ("abcdefgh", "--------"),  # as in FFHQ's folders, a thousand strangers each
        ("aaab", "xxx-"),
        ("aabb", "----"),  # a couple: neither is the person of the folder
        ("aaa.", "xxx-"),
        ("aa..", "----"),
        ("..", "--"),
        ("a", "-"),
    ],
)
def test_folder_is_a_person_as_far_as_its_faces_agree(faces, expected):
    photos = make_folder("x", faces)
    people = identify(photos, IdentitySettings(), 0.55)
    assert "".join(people.names[photo.id] or "-" for photo in photos) == expected
    assert people.origins["folder"] == expected.count("x") and people.origins["none"] == expected.count("-")
    assert len(people.notes) == (len(faces) > 1 and "-" in expected)


def test_folders_are_looked_at_one_by_one_and_the_user_is_told():
    photos = [*make_folder("00000", "abcd"), *make_folder("ann", "xxxy", 1), *make_folder("bob", "xx", 2)]
    people = identify(photos, IdentitySettings(), 0.55)
    assert [people.names[photo.id] for photo in photos] == [None] * 4 + ["ann"] * 3 + [None] + ["bob"] * 2
    mixed, unlike = people.notes
    assert "1 sub-folder(s) hold several people (00000): each of their 4 photos is its own person" in mixed
    assert "identity.source=folder" in mixed
    assert "1 photo(s) are not of the person of their sub-folder (ann/3.png)" in unlike


def test_folders_that_nobody_looked_into_are_no_people():
    photos = [*make_folder("ann", "aa"), *make_folder("bob", "bb")]
    people = identify(photos, IdentitySettings(), None, "no recogniser")
    assert set(people.names.values()) == {None} and people.origins == {"none": 4}
    assert "4 photos lie in 2 sub-folder(s)" in people.notes[0] and "(no recogniser)" in people.notes[0]
    asked = identify(photos, IdentitySettings(source="folder"), None)
    assert set(asked.names.values()) == {"ann", "bob"} and asked.notes == []


def test_clustering_separates_people_and_numbers_them_by_size():
    random = np.random.default_rng(0)
    centres = {"ann": (0, 0, 1), "bob": (0, 1, 0), "carl": (1, 0, 0)}
    who = ["bob", "ann", "ann", "carl", "ann", "bob"]
    ids = [f"{name}{place}" for place, name in enumerate(who)]
    vectors = [np.array(centres[name]) + random.normal(0, 0.05, 3) for name in who]
    people = cluster(ids, vectors, 0.55)
    numbers = {"ann": "person-0001", "bob": "person-0002", "carl": "person-0003"}
    assert people == {id_: numbers[name] for id_, name in zip(ids, who, strict=True)}
    assert cluster(["a"], [[1.0, 0.0]], 0.5) == {"a": "person-0001"}


# --- stages ----------------------------------------------------------------------------------------------


def make_staged(size=(160, 120), faces=(BOX,), seed=0) -> Photo:
    values = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    photo = Photo("a", Path("a"), picture=Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
    photo.row = {"width": size[0], "height": size[1]}
    photo.faces = [DetectedFace(tuple(box)) for box in faces]
    return photo


def test_exactly_one_recognisable_face():
    keep = Filter(FilterSettings())
    reasons = {}
    for name, faces in {"none": (), "two": (BOX, [0, 0, 50, 50]), "background": (BOX, [0, 0, 20, 20])}.items():
        reasons[name] = keep([make_staged(faces=faces)])[0]
    assert reasons["none"].reason == "no face"
    assert (reasons["two"].reason, reasons["two"].detail) == ("several faces", "2, of 60, 50 pixels")
    assert reasons["background"].kept and reasons["background"].row["bbox"] == BOX


def test_sharpness_neither_depends_on_light_nor_on_size():
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut()).crop((170, 60, 280, 200))

    def measure(picture: Image.Image) -> float:
        picture = picture.resize((48, 48), Image.Resampling.BICUBIC)
        return sharpness(torch.from_numpy(np.array(picture)).float() / 255)

    sharp = measure(photo)
    assert sharp == pytest.approx(0.4, abs=0.3)
    assert measure(photo.point(lambda value: value // 5)) == pytest.approx(sharp, rel=0.1)
    assert measure(photo.resize((220, 280), Image.Resampling.BICUBIC)) == pytest.approx(sharp, rel=0.15)
    assert measure(photo.filter(ImageFilter.GaussianBlur(3))) < 0.25 * sharp


@pytest.mark.parametrize(
    ("square", "expected"),
    [
        ((10, 10, 50, 50), (10, 10, 50, 50)),
        ((-10, 20, 50, 80), (0, 20, 60, 80)),
        ((130, 100, 190, 160), (100, 60, 160, 120)),
        ((-20, -20, 180, 180), (20, 0, 140, 120)),  # longer than the photo is high
    ],
)
def test_square_clamped_to_the_photo(square, expected):
    assert clamp_square(square, 160, 120) == expected


def test_crop_at_the_border_is_padded_or_clamped():
    photos = {}
    for border in ("pad", "clamp"):
        photo = make_staged(faces=([-10, 30, 50, 90],))
        photo.face = photo.faces[0]
        photos[border] = Crop(CropSettings(border=border, size=66))([photo])[0]
    assert photos["pad"].row["square_bbox"] == [-13.0, 27.0, 53.0, 93.0]
    assert photos["clamp"].row["square_bbox"] == [0.0, 27.0, 66.0, 93.0]
    assert (photos["pad"].crop[:, :10] - 0.5).abs().max() < 1e-5  # grey past the border
    exact = photos["clamp"].image[27:93, 0:66]
    assert (photos["clamp"].crop - exact).abs().max() < 1e-5  # sub-pixel exact: one pixel for one


def test_parser_mask_is_recorded(monkeypatch):
    class Parser:
        name = "test parser"

        def parse(self, image, landmarks):
            mask = torch.zeros(image.shape[:2])
            half = image.shape[0] // 2
            mask[half - 20 : half + 20, half - 10 : half + 10] = 1
            return mask

    monkeypatch.setattr("trainer.preparation.faces.load_parser", lambda roots, device: Parser())
    photo = make_staged()
    points = torch.tensor([[65.0, 50], [95, 50], [80, 62], [70, 75], [90, 75]])
    photo.face = DetectedFace(tuple(BOX), landmarks=points)
    Mask(MaskSettings(), Path())([photo])
    assert photo.row["mask_kind"] == "test parser"
    assert photo.row["mask_area"] == pytest.approx(40 * 20 / (160 * 120), rel=0.02)


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


def test_insightface_vector_is_that_of_the_face(monkeypatch):
    vectors = {name: torch.nn.functional.normalize(torch.randn(512), dim=0) for name in ("mine", "other")}

    class Detector:
        def detect(self, image):
            return [
                DetectedFace((100, 70, 150, 118), embedding=vectors["other"]),
                DetectedFace((52, 31, 109, 92), embedding=vectors["mine"]),
            ]

    monkeypatch.setattr("trainer.preparation.recognisers.load_detector", lambda *_, **__: Detector())
    recogniser = load_recogniser(IdentitySettings(source="cluster", recogniser="insightface"), DetectSettings())
    stage = Recognise(recogniser, lambda photo: True, required=True)
    found, lost = make_staged(), make_staged()
    found.face, lost.face = DetectedFace(tuple(BOX)), DetectedFace((0, 0, 30, 30))
    stage([found, lost])
    assert np.array(found.vector) == pytest.approx(vectors["mine"].numpy(), abs=1e-5)
    assert lost.reason == "face not recognised" and lost.vector is None
    tolerated, unasked = make_staged(), make_staged()
    tolerated.face, unasked.face = DetectedFace((0, 0, 30, 30)), DetectedFace(tuple(BOX))
    Recognise(recogniser, lambda photo: photo is not unasked, required=False)([tolerated, unasked])
    assert tolerated.kept and tolerated.vector == [] and unasked.vector is None
