"""The identity benchmark: what it counts, its rows, its intervals. The scores themselves need the trained system."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.support import identity_measures as measures
from benchmarks.support.identity_chain import probe
from benchmarks.support.identity_ladder import COLORS, give, rungs
from benchmarks.support.identity_measures import branch_gflop, tokens_at
from benchmarks.support.identity_pull import head_boxes
from benchmarks.support.identity_rows import EQUAL, LADDER, OTHERS, all_rows, pairs_of, site_rows, without_face
from examples.small_model import settings
from examples.small_model.evaluate import bootstrap, requests
from feedface_core.config import SiteConfig
from feedface_core.guidance import Guidance, joint, text_then_face


def test_operations_of_a_branch_agree_with_pytorchs_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    from feedface_core.modules.branch import ControlBranch

    def attend(q, k, v, heads, mask=None):  # in matrix products, which the counter counts on every device
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    site = SiteConfig("input_blocks.1.1.transformer_blocks.0", 128, 4, 32)
    encoder = SimpleNamespace(tokens=37)
    light = {"mlp": False, "rank": 16}
    for self_attention, more in ((True, {}), (False, {}), (False, {"mlp": False}), (False, light), (True, light)):
        branch = ControlBranch(128, 128, 4, 32, 1, self_attention, attention=attend, **more)
        kv = branch.project_face(torch.randn(1, 2 * 37, 128))
        with FlopCounterMode(display=False) as counter:
            branch(torch.randn(1, 64, 128), kv)
        fields = {"mlp": True, "rank": None, "self_attention": self_attention} | more
        config = SimpleNamespace(sites=(site,), encoder=encoder, **fields)
        counted = branch_gflop(SimpleNamespace(config=config), 2, {"sample_size": 8, "block_out_channels": (128, 128)})
        assert counted == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-6)


@pytest.mark.parametrize("size, widths", [(64, (128, 128)), (128, (64, 128, 192))])
def test_tokens_of_the_sites_are_those_of_the_u_net(size, widths):
    from examples.small_model.denoiser import create
    from feedface_core.hosts import sd_unet

    unet = create(size, widths)
    sites = {site.path: site.name for site in sd_unet.list_sites(unet)}
    seen = {}
    for path, module in unet.named_modules():
        if path in sites:
            module.register_forward_hook(lambda m, i, o, name=sites[path]: seen.__setitem__(name, i[0].shape[1]))
    with torch.no_grad():
        unet(torch.randn(1, 16, size // 8, size // 8), 10, torch.randn(1, 32, 128))
    assert len(seen) == 7
    assert seen == {name: tokens_at(name, unet.config) for name in seen}


@pytest.mark.parametrize("size, widths", [(64, (128, 128)), (128, (64, 128, 192))])
def test_variants_with_fewer_sites_cover_both_resolutions(size, widths):
    from examples.small_model.denoiser import create
    from examples.small_model.variants import VARIANTS, overrides_of
    from feedface_core.hosts import sd_unet

    unet = create(size, widths)
    known = [site.name for site in sd_unet.list_sites(unet)]
    assert overrides_of("full", unet, size) == [f"data.resolution={size}"]
    assert all(len(overrides_of(name, unet, size)) > 1 for name in VARIANTS)
    for name, count in (("every-second-site", 4), ("one-a-resolution", 2)):
        chosen = json.loads(overrides_of(name, unet, size)[1].partition("=")[2])
        assert len(chosen) == count and set(chosen) <= set(known)
        assert len({tokens_at(site, unet.config) for site in chosen}) == 2


def test_intervals_draw_people_and_not_pictures():
    persons = np.repeat(np.arange(50), 4)
    values = np.repeat((np.arange(50) < 20).astype(float), 4)  # 20 of 50 people are always told right
    low, high = bootstrap(values, persons)
    # the standard error over people is sqrt(0.4 * 0.6 / 50) = 0.069; over 200 pictures it would be 0.035
    assert low == pytest.approx(0.4 - 1.96 * 0.069, abs=0.02)
    assert high == pytest.approx(0.4 + 1.96 * 0.069, abs=0.02)


def test_intervals_of_several_trainings_hold_what_the_trainings_differ_by():
    persons = np.arange(200)
    alike = np.random.default_rng(0).random((3, 200)) * 0.01 + 0.5
    apart = alike + np.array([[-0.2], [0.0], [0.2]])
    assert np.diff(bootstrap(alike, persons)) < 0.01
    low, high = bootstrap(apart, persons)
    assert low < 0.4 and high > 0.6
    assert bootstrap(alike[:1], persons) == bootstrap(alike[0], persons)


def test_guidance_without_a_face_computes_nothing_twice():
    assert without_face(joint(2.0)) == without_face(text_then_face(3.0, 7.0)) == Guidance(-2.0, 3.0, 0.0, 0.0)
    assert without_face(text_then_face(1.0, 5.0)).needed == ("text",)


def test_requests_do_not_depend_on_how_many_people_take_part():
    assert requests(3, 2) == requests(9, 2)[:6]
    assert len({request.seed for request in requests(100, 4)}) == 400


def test_other_noise_keeps_the_prompts():
    plain, other = requests(5, 2), requests(5, 2, noise=1)
    assert [one.scene for one in plain] == [one.scene for one in other]
    assert not {one.seed for one in plain} & {one.seed for one in other}


def test_rows_cover_the_comparisons_and_have_one_name_each():
    rows = list(all_rows(quick=False))
    assert len({row.name for row in rows}) == len(rows)
    assert {row.group for row in rows} == {
        "main",
        "references",
        "drawings",
        "guidance",
        "ladder",
        "again",
        "crops",
        "losses",
        "retrieval",
        "branches",
        "kinds",
        "training",
        "scales",
    }
    sites = [f"{name}.transformer_blocks.0" for name in ("input_blocks.1.1", "middle_block.1", "output_blocks.0.1")]
    cheaper = list(site_rows(sites))
    assert [row.name for row in cheaper] == [
        "all sites",
        *(f"without {site[:-21]}" for site in sites),
        "the last one alone",
    ]
    assert pairs_of(cheaper)[-4:] == [(row.name, "all sites") for row in cheaper[1:]]
    assert [row.without for row in cheaper] == [(), *((site,) for site in sites), tuple(sites[:2])]
    main = ["no face", "1 reference", "2 references", "4 references"]
    drawn = [row.name for row in all_rows(quick=True) if row.drawing is None]
    assert drawn == [*main, *(name + EQUAL for name in main)]


def test_rows_of_equal_colours_are_of_people_redrawn_so_and_say_it():
    splits = settings.load().people.splits
    for row in all_rows(quick=False):
        assert (EQUAL in row.name) == (splits[row.people].equal_colors is not None)
        others = splits[OTHERS[row.people]]
        assert others.number != splits[row.people].number and others.equal_colors == splits[row.people].equal_colors
        assert splits[row.people].number not in (splits["train"].number, splits["examiner"].number)


def test_frechet_distance_of_known_normal_distributions():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 1, (20000, 3)), rng.normal(2, 3, (20000, 3))
    assert measures.frechet(ours, ours) == pytest.approx(0, abs=1e-6)
    assert measures.frechet(ours, theirs) == pytest.approx(3 * (2**2 + (3 - 1) ** 2), rel=0.03)
    with pytest.raises(ValueError, match="depends on their number"):
        measures.frechet(ours, theirs[:100])


def test_balanced_accuracy_does_not_reward_the_most_frequent_value():
    wanted = np.array([0] * 90 + [1] * 10)
    assert measures.balanced_accuracy(np.zeros(100, int), wanted) == 0.5
    assert measures.balanced_accuracy(wanted, wanted) == 1.0


def test_copying_counts_only_what_differs_from_the_prompt():
    asked = {"expression": "smiling", "glasses": "none", "headwear": "cap"}
    shown = {"expression": "angry", "glasses": "glasses", "headwear": "cap"}
    read = {"expression": np.array([2]), "glasses": np.array([0]), "headwear": np.array([2])}
    assert measures.copied(read, [asked], [shown]) == 0.5  # the expression is the reference's, the glasses are not


def test_a_ladder_ends_with_every_feature_but_never_takes_the_strangers_scene():
    stranger = {"fatness": 0.1, "mouth": {"id": "theirs"}}
    person = {"fatness": 0.9, "mouth": {"id": "ours"}}
    for name in ("body", "hair", "hairBg", "facialHair", "head", "eye", "eyebrow"):
        for face, value in ((stranger, "a"), (person, "b")):
            face[name] = {"id": value, "color": value, "flip": value, "shave": value, "angle": value}
    steps = list(rungs().values())
    assert steps[0] == [] and all(set(one) < set(other) for one, other in zip(steps, steps[1:], strict=False))
    mixed = give(stranger, person, steps[-1])
    assert (mixed["hair"]["id"], mixed["eyebrow"]["angle"], mixed["fatness"]) == ("b", "b", 0.9)
    assert mixed["mouth"] == {"id": "theirs"}
    assert stranger["hair"]["id"] == "a"
    bleached = give(person, stranger, COLORS)
    assert bleached["hair"]["color"] == "a" and bleached["hair"]["id"] == "b"
    assert len(LADDER) == len(steps) + 1


def test_a_probe_finds_what_is_linear_in_states_and_nothing_in_noise():
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(600, 40, generator=rng)
    values = np.array(["a", "b", "c"])[states[:, :3].argmax(1).numpy()]
    told = probe(states[:500], {"first": values[:500]}, states[500:])["first"]
    assert measures.balanced_accuracy(told, values[500:]) > 0.75
    noise = torch.randn(600, 40, generator=rng)
    told = probe(noise[:500], {"first": values[:500]}, noise[500:])["first"]
    assert measures.balanced_accuracy(told, values[500:]) < 0.55


def test_a_block_that_is_switched_off_comes_back():
    from examples.small_model import system
    from examples.small_model.evaluate import SmallModel

    model = SmallModel()
    model.use(system.FOLDER / system.ADAPTER)
    weights = [branch.zero_linear.weight for branch in model.adapter.branches]
    kept = [weight.clone() for weight in weights]
    with model.without([model.adapter.config.sites[place].name for place in (2, 4)]):
        assert [bool(weight.any()) for weight in weights] == [True, True, False, True, False, True, True]
    with model.without(()):
        assert all(map(torch.equal, weights, kept))
    assert all(map(torch.equal, weights, kept))


def test_a_head_is_the_box_around_its_mask_and_a_speck_is_none():
    masks = torch.zeros(3, 1, 64, 64)
    masks[0, 0, 10:40, 20:50] = 1.0
    masks[1, 0, 10:13, 20:50] = 1.0
    assert head_boxes(masks) == [(20.0, 10.0, 50.0, 40.0), None, None]
