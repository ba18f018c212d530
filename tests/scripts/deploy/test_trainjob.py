"""trainjob.yaml compared with the models that Kubeflow publishes, and with our options and exit codes."""

from __future__ import annotations

from typing import Any

import click
import pytest
import yaml

from alexnet import EXIT_WRONG_USE
from data_pipeline.common.errors import InterruptedRunError
from tests.helpers.ranks import REPOSITORY
from train.cli import train
from train.config.load import make_config


@pytest.fixture
def models() -> dict[str, Any]:
    """Kubeflow's models by kind; imported here, since collecting tests should not take seconds."""
    pytest.importorskip("kubeflow_trainer_api", reason="needs it: pip install 'alexnet[dev]'")
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
    from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

    return {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}


@pytest.fixture
def documents() -> dict[str, Any]:
    """The file's documents by kind."""
    with (REPOSITORY / "scripts" / "deploy" / "trainjob.yaml").open() as file:
        return {document["kind"]: document for document in yaml.safe_load_all(file)}


@pytest.mark.slow
def test_trainjob_documents_fit_kubeflows_models(documents: dict[str, Any], models: dict[str, Any]) -> None:
    """A key that a model does not know is lost on the way through it."""
    assert set(documents) == set(models)
    for kind, document in documents.items():
        read = models[kind].from_dict(document)
        assert read is not None and read.to_dict() == document

    documents["TrainJob"]["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):  # pydantic's
        models["TrainJob"].from_dict(documents["TrainJob"])
    misspelt = documents["TrainingRuntime"]
    misspelt["spec"]["template"]["spec"]["failurePolicy"]["maxRestart"] = 1
    read = models["TrainingRuntime"].from_dict(misspelt)
    assert read is not None and read.to_dict() != misspelt


def test_trainjob_names_existing_runtime_volumes_and_options(documents: dict[str, Any]) -> None:
    job, runtime = documents["TrainJob"]["spec"], documents["TrainingRuntime"]
    assert job["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"],
    }  # fmt: skip
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}

    assert job["trainer"]["command"] == ["alexnet", "train"]
    given = train.make_context("train", list(job["trainer"]["args"])).params
    assert {str(given["data"]), str(given["out"])} <= set(mounts)
    assert given["resume"] == "auto"
    assert make_config(given["recipe"], given["overrides"]).checkpoint_every == 500
    assert isinstance(train, click.Command)


def test_trainjob_rules_match_our_exit_codes(documents: dict[str, Any]) -> None:
    runtime = documents["TrainingRuntime"]["spec"]["template"]["spec"]
    job = runtime["replicatedJobs"][0]["template"]["spec"]
    rules = job["podFailurePolicy"]["rules"]
    actions = {r["onExitCodes"]["values"][0]: r["action"] for r in rules if "onExitCodes" in r}
    assert actions == {InterruptedRunError.exit_code: "Ignore", EXIT_WRONG_USE: "FailJob"}
    assert runtime["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    # A pod failure policy is only allowed where pods are not restarted in place.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] > 30
