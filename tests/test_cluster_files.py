"""Every rendered file is one that its own tool accepts, costs nothing while nobody asks for it, and holds no secret."""

import os
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from medssl import cli
from medssl.platform import cluster, find, jobs, spending, sweep
from medssl.platform.errors import UsageError

SWEEP = ("sweep", "iou-interval", "--data", "acdc")

# The CRDs of KubeRay's ray.io/v1 (ray-operator/apis/ray/v1): fields that we set, which of them must be there, and their types.
NAME, COUNT, PARAMETERS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"additionalProperties": {"type": "string"}}


def of(required: dict, **optional: dict) -> dict:
    properties = required | optional
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


CONTAINER = of(
    {"name": NAME, "image": NAME},
    command={"type": "array", "items": NAME},
    env={"type": "array", "items": of({"name": NAME, "value": NAME})},
    resources=of({}, requests=PARAMETERS, limits=PARAMETERS),
    volumeMounts={"type": "array", "items": of({"name": NAME, "mountPath": NAME})},
)
POD = of(
    {"containers": {"type": "array", "minItems": 1, "items": CONTAINER}},
    initContainers={"type": "array", "items": CONTAINER},
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    serviceAccountName=NAME,
    affinity={"type": "object"},
    tolerations={"type": "array", "items": of({}, key=NAME, operator={"enum": ["Exists", "Equal"]}, value=NAME, effect=NAME)},
    volumes={"type": "array", "items": {"type": "object", "required": ["name"]}},
)
GROUP = {"rayStartParams": PARAMETERS, "template": of({"spec": POD})}
CLUSTER = of(
    {"headGroupSpec": of(GROUP)},
    rayVersion=NAME,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=of(
        {},
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    workerGroupSpecs={
        "type": "array",
        "items": of(GROUP | {"groupName": NAME, "minReplicas": COUNT, "maxReplicas": COUNT}, replicas=COUNT),
    },
)
JOB = of(
    {}, entrypoint=NAME, shutdownAfterJobFinishes={"type": "boolean"}, ttlSecondsAfterFinished=COUNT, rayClusterSpec=CLUSTER
)


def resource(kind: str, spec: dict) -> dict:
    return of({"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": of({"name": NAME}), "spec": spec})


def test_the_cluster_file_of_the_root_is_what_render_aws_prints():
    assert (find.ROOT / "cluster.yaml").read_text() == cluster.render("aws")


@pytest.mark.parametrize("kind", ["aws", "gcp"])
def test_rays_launcher_accepts_the_clouds_whose_workers_are_spot_first_and_cost_nothing_unasked(kind):
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(yaml.safe_load(cluster.render(kind, ["max=3", "idle=2"])))
    validate_config(whole)
    types = whole["available_node_types"]
    head = types.pop(whole["head_node_type"])
    assert head["resources"]["CPU"] == head["resources"]["GPU"] == 0, "the head runs no trials"
    assert {(node["min_workers"], node["max_workers"], node["resources"]["GPU"]) for node in types.values()} == {(0, 3, 1)}
    assert whole["idle_timeout_minutes"] == 2
    spot, other = types["spot"], types["on-demand"]
    assert spot["priority"] > other["priority"], "on demand only where there is no spot machine"
    assert "SPOT" in str(spot["node_config"]).upper()
    assert "SPOT" not in str(other["node_config"]).upper()
    store = {"aws": "s3://", "gcp": "gs://"}[kind]
    assert f"MEDSSL_RUNS={store}" in " ".join(whole["setup_commands"])
    assert "~/medssl" in whole["file_mounts"], "installed from this repository"


@pytest.mark.parametrize(("command", "schema"), [((), resource("RayCluster", CLUSTER)), (SWEEP, resource("RayJob", JOB))])
def test_kuberay_accepts_the_cluster_and_the_job(command, schema):
    whole = yaml.safe_load(cluster.render("kubernetes", ["max=4", "idle=3"], command))
    jsonschema.validate(whole, schema)
    spec = whole["spec"] if not command else whole["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 4)
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 180
    mounted = {mount["name"] for mount in workers["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in workers["template"]["spec"]["volumes"]}
    if command:
        assert whole["spec"]["entrypoint"].endswith("sweep iou-interval --data acdc --address auto")
        assert whole["spec"]["shutdownAfterJobFinishes"], "it ends with its sweep"


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, flags=re.MULTILINE))


def test_a_slurm_script_is_bash_and_its_directives_are_sbatchs(tmp_path):
    changes = [
        "account=one,two",
        "time=4:00:00",
        "nodes=2",
        "cpus=6",
        "gpus=2",
        "scratch=$SLURM_TMPDIR",
        "sbatch.mail-type=FAIL",
    ]
    script = cluster.render("slurm", [*changes, "sbatch.requeue"], (*SWEEP, "-o", "pretrain.iou=[0, 1]"))
    found = directives(script)
    assert set(found) <= cluster.SBATCH
    expected = {"time": "4:00:00", "nodes": "2", "cpus-per-task": "6", "gpus-per-node": "2", "mail-type": "FAIL", "requeue": ""}
    assert expected.items() <= found.items()
    assert "account" not in found
    assert "for account in one two; do sbatch --account=$account" in script
    assert found["dependency"] == "singleton", "jobs follow each other: one driver at a time"
    file = tmp_path / "sweep.sbatch"
    file.write_text(script)
    subprocess.run(["bash", "-n", file], check=True)
    last = script.splitlines()[-1]
    assert last == "medssl sweep iou-interval --data acdc -o 'pretrain.iou=[0, 1]' --address \"$head:$port\""
    assert directives(cluster.render("slurm", ["account=one", "gpus=0"], SWEEP))["account"] == "one"


def test_a_slurm_script_starts_ray_once_on_every_node_and_then_its_command(tmp_path):
    """Played with programs that only write down how they were called; the second look finds both nodes up."""
    said = tmp_path / "said"
    for name in ("ray", "medssl"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {said}\n')
    (tmp_path / "srun").write_text(
        f'#!/bin/sh\necho "srun $*" >> {said}\nwhile [ "${{1#--}}" != "$1" ]; do shift; done; "$@"\n'
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\necho up >> {said}\ngrep -c up {said}\n")
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("ray", "medssl", "srun", "python", "sleep"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "slices").write_text("pixels")
    changes = ["nodes=2", "cpus=6", "gpus=2", f"scratch={tmp_path}/$SLURM_JOB_ID", "prepare=echo $not_set > /dev/null"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "25", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"SLURMD_NODENAME": "n1", "MEDSSL_DATA": "my data"}
    for _ in range(2):  # the second job of a sweep copies nothing into the copy of the first
        said.write_text("")
        script = cluster.render("slurm", changes, (*SWEEP, "-o", "pretrain.iou=[0, 1]"))
        subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=environment)
    assert [file.name for file in (tmp_path / "25" / "data").iterdir()] == ["slices"]
    calls = said.read_text().splitlines()
    head = next(re.search("--node-ip-address=(\\S+)", call) for call in calls if call.startswith("ray start --head"))[1]
    assert "--num-cpus=6 --num-gpus=2" in calls[1]
    srun = next(call for call in calls if "ray start --address" in call and call.startswith("srun"))
    assert {"--nodes=1", "--cpus-per-task=6", "--exclude=n1", f"--address={head}:20025"} <= set(srun.split())
    assert calls[-1] == f"medssl sweep iou-interval --data acdc -o pretrain.iou=[0, 1] --address {head}:20025"
    assert "--address" not in cluster.render("slurm", [], ("pretrain", "simsiam")).splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "changes", "command", "message"),
    [
        ("azure", [], (), 'no kind of cluster "azure"; found: aws'),
        ("aws", ["regoin=x"], (), r'no setting "regoin" of aws; did you mean region\?'),
        ("aws", ["max=many"], (), "expected a whole number"),
        ("aws", [], SWEEP, "medssl cluster submit"),
        ("slurm", ["sbatch.cpu-per-task=3"], SWEEP, r"no such directive; did you mean cpus-per-task\?"),
        ("slurm", ["time=soon"], SWEEP, "time=soon: expected"),
        ("slurm", [], (), "needs its sweep"),
        ("slurm", ["name=my sweep"], SWEEP, "name=my sweep: expected at most 50 small letters"),
        ("kubernetes", ['image=x"y'], (), "neither quotes"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind, changes, command, message):
    with pytest.raises(UsageError, match=message):
        cluster.render(kind, changes, command)


@pytest.mark.parametrize("kind", cluster.KINDS)
def test_no_file_holds_a_secret_or_a_placeholder_left_open(kind):
    text = cluster.render(kind, (), SWEEP if kind == "slurm" else ())
    assert "{{" not in text
    assert not re.search(r"(?i)(secret|token|password|access.?key|AKIA)", text)
    assert max(map(len, text.splitlines())) <= 200


def test_the_command_line_prints_it():
    told = CliRunner().invoke(cli.app, ["cluster", "render", "slurm", "-o", "cpus=3", "--", *SWEEP])
    assert told.exit_code == 0
    assert told.stdout == cluster.render("slurm", ["cpus=3"], SWEEP)


@pytest.mark.parametrize(
    "words", [["submit", *SWEEP], ["status"], ["logs"], ["logs", "medssl-sweep"], ["down"], ["down", "--yes"]]
)
def test_without_rays_dashboard_every_command_of_a_running_cluster_says_what_to_install(words, monkeypatch, capsys):
    """As in an installation without `medssl[cluster]`, wherever this runs."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # importing it fails
    monkeypatch.setattr(sys, "argv", ["medssl", "cluster", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    needed = 'Ray\'s Jobs API needs ray[default], which is not installed here; python -m pip install "medssl[cluster]"'
    assert err == f"error: {needed}\n"


def test_only_commands_of_medssl_are_submitted():
    """Before anything is asked of a cluster."""
    for words in ([], ["rm", "-rf"], ["cluster", "down"]):
        with pytest.raises(UsageError, match="what shall the cluster do"):
            jobs.submit(words, None)


def test_a_cluster_is_shut_down_after_a_sweep_that_failed_too_and_only_where_it_says_how(monkeypatch, tmp_path):
    request = sweep.Request("no-such-space", "phantom", 1, 1)
    monkeypatch.delenv("MEDSSL_SHUTDOWN", raising=False)
    with pytest.raises(UsageError, match="MEDSSL_SHUTDOWN"):
        sweep.run(request, time_budget=None, address=None, shutdown=True, say=print)
    ended = []
    monkeypatch.setenv("MEDSSL_SHUTDOWN", "echo going down")
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **how: ended.append(command[-1]))
    with pytest.raises(UsageError, match="no-such-space"):
        sweep.run(request, time_budget=None, address=None, shutdown=True, say=print)
    assert ended == ["sleep 5; echo going down"]


def test_what_a_cluster_cost_and_goes_on_costing_is_said():
    told = spending.idle(spending.Spending(machine_seconds=9000.0, price=2.0), machines=3)
    assert "2.50 machine-hours, 5.00 in money" in told
    assert "3 machines are still up for 6.00 an hour" in told


def test_rendering_imports_neither_torch_nor_ray():
    code = (
        "import sys; from medssl.platform import cluster; cluster.render('aws'); assert not {'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
