"""A pretraining upon a pretraining: stages that arms share, what each hands on, kills on the way, batches by partition."""

import dataclasses
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from medssl.methods.global_contrast import partition
from medssl.platform import catalogue, checkpoint, config, plan, report, splits, stages, stream, sweep, weights
from medssl.platform.datasets import phantom
from medssl.platform.errors import RunError, UsageError
from medssl.platform.site import Site
from medssl.platform.store import Store

SMALL: dict[str, Any] = {
    "network": {"width": 4, "levels": 3},
    "pretrain": {"name": "global_contrast", "side": 16, "hidden": 16, "d": 8, "training": {"steps": 4, "batch": 8}},
    "further": {"name": "local_contrast", "side": 16, "blocks": 1, "negatives": 2, "training": {"steps": 4, "batch": 4}},
    "finetune": {"side": 32, "training": {"steps": 2, "batch": 4, "evaluations": 1}},
    "evaluate": {"inference": "whole"},
    "resources": {"checkpoint_seconds": 0.0, "gpus": 0},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: Any) -> Store:
    """Seven small phantoms."""
    source, data = tmp_path_factory.mktemp("scans") / "seven", tmp_path_factory.mktemp("data")
    phantom.generate(source, patients=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_DATA", str(data))
        catalogue.prepare(str(source), changes={"spacing_mm": (6.0, 6.0, 12.0), "pad": 32}, workers=1, say=lambda text: None)
    return Store.open(data / "seven")


def chain_of(store: Store, m: int = 1, **dotted: Any) -> plan.Chain:
    changes = config.nested({key.replace("__", "."): value for key, value in dotted.items()})
    experiment = config.build(config.stack([SMALL, changes]))
    split = splits.load(store, "seed-0")
    return plan.chain("arm", 0, m, plan.resolve(experiment, store, split), store, split)


def work_in(store: Store, runs: Path) -> stages.Work:
    return stages.Work(Site(store.root.parent, runs), store.root, splits.load(store, "seed-0"))


def test_arms_share_the_stages_that_they_have_in_common(prepared: Store) -> None:
    both, encoder, scratch = chain_of(prepared), chain_of(prepared, further=None), chain_of(prepared, pretrain=None)
    assert [stage.kind for stage in both.stages] == ["pretrain", "pretrain", "finetune"]
    assert both.further is not None
    assert both.pretraining == encoder.pretraining
    assert both.further.parent == both.pretraining.id
    assert both.finetunings[0].parent == both.further.id
    assert encoder.finetunings[0].parent == encoder.pretraining.id
    assert scratch.pretrainings == (), "nothing is further than nothing"
    assert scratch.experiment.further is None
    other = chain_of(prepared, further__temperature=0.2)
    assert (other.pretraining, other.further == both.further) == (both.pretraining, False)
    labels = chain_of(prepared, data__labelled=1)
    assert labels.pretrainings == both.pretrainings
    assert labels.finetunings != both.finetunings


def test_without_a_further_pretraining_nothing_about_it_enters_an_id(prepared: Store) -> None:
    plain = chain_of(prepared, further=None).experiment
    assert "further" not in plain.tree()
    assert config.build(plain.tree()) == plain
    assert config.build(chain_of(prepared).experiment.tree()).further == chain_of(prepared).experiment.further


@pytest.fixture(scope="module")
def done(prepared: Store, tmp_path_factory: Any) -> tuple[plan.Chain, stages.Work]:
    """The three stages, finished."""
    chain, work = chain_of(prepared), work_in(prepared, tmp_path_factory.mktemp("runs"))
    stages.run_chain(chain, work)
    return chain, work


def test_the_decoders_stage_leaves_the_encoder_as_it_was_and_fine_tuning_receives_exactly_its_blocks(done: Any) -> None:
    chain, work = done
    first, second = (work.site.stage(stage.id) / "encoder.pt" for stage in chain.pretrainings)
    encoder, handed = checkpoint.load(first)["encoder"], checkpoint.load(second)
    assert checkpoint.digest(encoder) == checkpoint.digest(handed["encoder"])
    assert "decoder" not in checkpoint.load(first)

    def fresh() -> Any:
        torch.manual_seed(5)
        return stages.network(chain.experiment, 1, 3)

    network = fresh()
    read, met = weights.begin_network(network, second)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, fresh().state_dict()[key])}
    asked = {key for key in network.state_dict() if key.startswith(("encoder.", "decoder.ups.0.", "decoder.blocks.0."))}
    begun_as_ones_and_zeros = {key for key in asked if key.endswith((".1.bias", ".4.bias"))}
    assert asked - begun_as_ones_and_zeros <= changed <= asked
    assert set(met.matched) == asked
    assert set(met.missing) == set(network.state_dict()) - asked
    assert (met.unexpected, met.reshaped) == ((), ())
    assert read.chain == handed["card"]["chain"]
    tuned = work.site.done(chain.finetunings[0].id)
    assert [part.split(":")[0] for part in tuned["chain"].split(" -> ")] == ["global_contrast", "local_contrast", "segment"]


def test_blocks_that_do_not_fit_are_refused_with_their_keys(done: Any) -> None:
    chain, work = done
    narrow = dataclasses.replace(chain.experiment.network.settings, down="stride")
    network = stages.network(
        dataclasses.replace(chain.experiment, network=dataclasses.replace(chain.experiment.network, settings=narrow)), 1, 3
    )
    network.decoder.ups[0] = torch.nn.ConvTranspose2d(16, 9, 2, 2)
    with pytest.raises(RunError, match=r"blocks of a decoder do not fit .* 2 of another shape \(decoder\.ups\.0\.weight"):
        weights.begin_network(network, work.site.stage(chain.further.id) / "encoder.pt")


def test_a_further_pretraining_is_the_pretraining_from_given_weights(done: Any, prepared: Store) -> None:
    chain, work = done
    folder = str(work.site.stage(chain.pretraining.id))
    typed = config.stack([SMALL, {"pretrain": None, "further": None, "start": {"weights": folder}}])
    typed = {**typed, "pretrain": SMALL["further"]}
    split = splits.load(prepared, "seed-0")
    alone = plan.chain("typed", 0, 1, plan.resolve(config.build(typed), prepared, split), prepared, split)
    assert [stage.id for stage in alone.stages] == [chain.further.id, chain.finetunings[0].id]
    told = json.loads((work.site.stage(chain.further.id) / "run.json").read_text())
    again = config.build(told["config"])
    assert (again.pretrain.name, again.further, again.start.weights) == ("local_contrast", None, folder)


@pytest.mark.parametrize(("recipe", "decoder"), [("self-paced-acdc", "dense_infonce"), ("boundary-acdc", "boundary_aware")])
def test_a_recipe_trains_the_encoder_then_the_decoder_then_both_on_labels(
    recipe: str, decoder: str, prepared: Store, tmp_path: Path
) -> None:
    names = {"partition": "equal", "labels": ["partition", "patient"], "shares": [1.0, 0.1]}  # phantoms have no phase
    short = {"side": 16, "training": {"steps": 2, "batch": 4}}
    small: dict[str, Any] = {"network": {"width": 4, "levels": 3}, "pretrain": short | names, "further": short}
    small |= {"finetune": {"side": 16, "training": {"steps": 2, "batch": 2, "evaluations": 1}}, "data": {"labelled": 2}}
    small |= {key: SMALL[key] for key in ("evaluate", "resources")}
    if recipe == "self-paced-acdc":
        small |= {"hooks": {"self_paced": names}, "unlabelled": {"batch": 2}}
    experiment = config.build(config.stack([config.read(Path(recipe)), small]))
    split = splits.load(prepared, "seed-0")
    chain, work = (
        plan.chain("arm", 0, 1, plan.resolve(experiment, prepared, split), prepared, split),
        work_in(prepared, tmp_path),
    )
    stages.run_chain(chain, work)
    first, second = (checkpoint.load(work.site.stage(stage.id) / "encoder.pt") for stage in chain.pretrainings)
    assert checkpoint.digest(first["encoder"]) != checkpoint.digest(second["encoder"]), "the encoder is trained on"
    network = stages.network(chain.experiment, 1, 3)
    assert set(second["decoder"]) == {key for key in network.state_dict() if key.startswith("decoder.")}
    tuned = work.site.done(chain.finetunings[0].id)
    assert [part.split(":")[0] for part in tuned["chain"].split(" -> ")] == ["infonce", decoder, "segment"]


@pytest.mark.parametrize("recipe", ["finetune-acdc-mi", "finetune-acdc-mi-output", "finetune-acdc-prototypes"])
def test_a_recipe_of_one_stage_trains_with_its_hooks(recipe: str, prepared: Store, tmp_path: Path) -> None:
    small: dict[str, Any] = {"pretrain": None, "network": {"width": 4}, "data": {"labelled": 2}, "unlabelled": {"batch": 2}}
    small |= {"finetune": {"side": 16, "training": {"steps": 2, "batch": 2, "evaluations": 1}}}
    small |= {key: SMALL[key] for key in ("evaluate", "resources")}
    tree, split = config.read(Path(recipe)), splits.load(prepared, "seed-0")
    experiment = plan.resolve(config.build(config.stack([tree, small])), prepared, split)
    chain, work = plan.chain("arm", 0, 1, experiment, prepared, split), work_in(prepared, tmp_path)
    stages.run_chain(chain, work)
    losses = work.site.done(chain.finetunings[0].id)["losses"]
    assert {name.partition("/")[0] for name in losses} == {"dice", "cross_entropy", *tree["hooks"]}
    assert all(math.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_in_either_pretraining_changes_nothing(prepared: Store, done: Any, tmp_path: Path, monkeypatch, killed) -> None:
    undisturbed, work = done
    chain, mine = chain_of(prepared), work_in(prepared, tmp_path)
    folder = mine.site.stage(chain.pretrainings[killed].id)
    save, saved = checkpoint.save, []

    def dying(path: Path, state: Any) -> None:
        save(path, state)
        if path.parent == folder and path.name == "checkpoint.pt":
            saved.append(state["step"])
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        stages.run_chain(chain, mine)
    assert saved == [1]
    monkeypatch.setattr(checkpoint, "save", save)
    stages.run_chain(chain, mine)
    for stage in undisturbed.pretrainings:
        ours, theirs = (checkpoint.load(each.site.stage(stage.id) / "encoder.pt") for each in (mine, work))
        assert checkpoint.digest({**ours, "card": 0}) == checkpoint.digest({**theirs, "card": 0})
    tuned = undisturbed.finetunings[0].id
    assert mine.site.done(tuned)["test"] == work.site.done(tuned)["test"]


def test_a_finished_encoder_is_looked_up_by_the_arm_that_goes_on_from_it(prepared: Store, tmp_path: Path) -> None:
    mine = work_in(prepared, tmp_path)
    stages.run_chain(chain_of(prepared, m=0, further=None), mine)
    (file,) = mine.site.runs.rglob("done.json")
    before = file.stat().st_mtime_ns
    stages.run_chain(chain_of(prepared, m=0), mine)
    assert file.stat().st_mtime_ns == before
    assert len(list(mine.site.runs.rglob("done.json"))) == 2


# Batches


@pytest.mark.parametrize(
    ("dotted", "sentence"),
    [
        (
            {"pretrain__training__batch": 10},
            r"pretrain\.training\.batch=10: .* use a multiple of 4, or pretrain\.strategy=random",
        ),
        ({"pretrain__training__accumulate": 4}, "use a multiple of 16"),
        ({"resources__workers": 4}, "use a multiple of 16"),
        ({"further__strategy": "correspondence", "further__training__batch": 6}, r"further\.training\.batch=6"),
        ({"data__stream": "ray"}, r"data\.stream=ray delivers slices as they lie on disk"),
        ({"further__blocks": 3}, r"further\.blocks=3: the decoder of a unet of 3 levels has 2"),
        ({"network__spatial_dims": 3}, r"further\.name=local_contrast trains on slices only"),
        ({"network__name": "swin_unetr", "network__levels": None}, "network"),
    ],
    ids=str,
)
def test_what_cannot_be_composed_is_refused_before_anything_starts(prepared: Store, dotted: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        chain_of(prepared, **dotted)
    free = {"pretrain__strategy": "random", "pretrain__training__batch": 10, "data__stream": "ray"}
    assert chain_of(prepared, **free).stages


def test_random_pairs_keep_the_batches_that_they_had(prepared: Store, tmp_path: Path) -> None:
    chain, work = chain_of(prepared, pretrain__strategy="random"), work_in(prepared, tmp_path)
    job, slices = stages.Job(chain, chain.pretraining, work), work.slices("train")
    ours = stages._batches(job, chain.experiment.pretrain, work.split.train, None, 0, 1, torch.device("cpu"))(3)
    theirs = stream.node_batches(slices, 8, seed=chain.pretraining.seed, start=3)
    for own, other in islice(zip(ours, theirs, strict=False), 4):
        assert torch.equal(own["index"], other["index"])


@given(st.lists(st.integers(1, 9), min_size=4, max_size=8), st.sampled_from([2, 3, 4]), st.integers(0, 99))
@hypothesis_settings(max_examples=25, deadline=None)
def test_no_image_of_a_batch_is_blank_or_comes_twice_whatever_the_lengths_of_volumes(lengths, parts, start) -> None:
    """From `_batches` on: images, not rows. Each slice is filled with its own number."""
    lengths = [*lengths, 2 * parts]
    count = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    position = torch.cat([torch.arange(n) / max(n - 1, 1) for n in lengths])
    held = stream.Slices(
        image=torch.arange(1, count + 1, dtype=torch.int16).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(),
        label=None, labelled=torch.zeros(count, dtype=torch.bool), size=torch.full((count, 2), 4), position=position,
        patient=owner, volume=owner, slice_index=place, spacing_mm=torch.ones(count, 3),
        patient_names=tuple(f"p{n}" for n in range(len(lengths))), volume_names=tuple(f"v{n}" for n in range(len(lengths))),
    )  # fmt: skip
    scarce = int(torch.bincount(partition(position, parts), minlength=parts).min())
    tree = config.stack([SMALL, config.nested({"pretrain.partitions": parts, "pretrain.training.batch": scarce * parts})])
    experiment = config.build({**tree, "further": None, "data": {"stream": "node"}})

    class Work:
        store, arrays, slices = Path(), None, staticmethod(lambda part: held)

    stage = plan.Stage("pretrain", "id", start, 4, None)
    job: Any = stages.Job(plan.Chain("arm", 0, experiment, stage, ()), stage, Work)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Store, "open", lambda root: None)
        batches = stages._batches(job, experiment.pretrain, held.patient_names, None, 0, 1, torch.device("cpu"))
    for batch in islice(batches(start), 3):
        numbers = batch["image"][:, 0, 0, 0].tolist()
        assert min(numbers) >= 1, "blank"
        assert len(set(numbers)) == len(numbers) == scarce * parts, "twice"
        assert torch.bincount(partition(batch["position"], parts), minlength=parts).tolist() == [scarce] * parts


def test_views_of_whole_slices_have_the_side_of_the_largest_slice(prepared: Store) -> None:
    experiment = chain_of(prepared, pretrain__side=None, further__side=None).experiment
    longest = max(max(volume.height, volume.width) for volume in prepared.volumes)
    assert experiment.pretrain.settings.side == experiment.further.settings.side == -(-longest // 16) * 16
    assert chain_of(prepared, pretrain__name="global_contrast").experiment.pretrain.settings.side == 16


def test_settings_of_several_types_are_read_from_what_is_typed() -> None:
    def typed(text: str) -> Any:
        return config.build(config.stack([SMALL, config.nested(dict([config.override(text)]))])).further.settings

    assert typed("further.regions=paper").regions == "paper"
    assert typed("further.regions=9").regions == 9
    assert typed("further.d=null").d is None
    with pytest.raises(UsageError, match=r"further\.regions"):
        typed("further.regions=papers")
    with pytest.raises(UsageError, match=r'unknown key "further\.region_size"; did you mean'):
        typed("further.region_size=3")


def test_what_a_data_set_says_of_a_pretraining_holds_for_a_further_one() -> None:
    defaults = {"pretrain.side": 24, "pretrain.training.steps": 7, "pretrain.bottleneck": 3}
    named = {"pretrain": {"name": "global_contrast"}, "further": {"name": "local_contrast", "d": 9}}
    built = config.build(config.suited(defaults, named))
    assert built.further is not None
    assert (built.further.settings.side, built.further.settings.d, built.further.training.steps) == (24, 9, 7)
    assert config.build(config.suited(defaults, {"pretrain": named["pretrain"]})).further is None


def test_each_stage_has_a_command_of_its_own(prepared: Store, tmp_path: Path) -> None:
    chain = chain_of(prepared)
    (tmp_path / "arms.json").write_text(json.dumps({"arm": {"further.temperature": 0.3}}))
    base = config.stack([SMALL, {"data": {"name": "seven"}}])
    asked = sweep.Sweep("space", "?", "arm", "grid", base, {}, 1, 1, prepared.root, "seed-0", tmp_path)
    first, second, tuned = (report.command(asked, chain, stage, 0) for stage in chain.stages)
    assert first.startswith("medssl pretrain global_contrast --data seven")
    assert second.startswith(f"medssl pretrain local_contrast --from {chain.pretraining.id} --data seven")
    assert "-o pretrain.blocks=1" in second
    assert "-o pretrain.temperature=0.3" in second
    assert "-o pretrain.hidden=16" in first
    assert tuned.startswith(f"medssl finetune --from {chain.further.id}")
    assert not any("further." in command for command in (first, second, tuned))
