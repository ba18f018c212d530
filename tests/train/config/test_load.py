"""Recipes, overrides, and what an unknown or impossible value is answered with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.errors import UserError
from train.config.load import decode_config, make_config, to_json
from train.config.schema import RunConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedul.kind=step", "unknown key 'schedul'; did you mean 'schedule'?"),
        ("schedule.learnin_rate=1", "unknown key 'schedule.learnin_rate'; did you mean 'schedule.learning_"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'schedule.learning_rate'?"),
        ("schedule.kind=linear", "schedule.kind: Invalid enum value 'linear'; it is one of step, plateau"),
        ("schedule.learning_rate=0", "schedule.learning_rate: Expected `float` > 0.0"),
        ("epochs=0", "epochs: Expected `int` >= 1"),
        ("global_batch=many", "global_batch: Expected `int`, got `str`"),
        ("model=3", "key 'model' is a table"),
        ("epochs.x=3", "'epochs' is a value, not a table"),
        ("augment.flip=2", "flip is a probability"),
        ("preprocessing.crop_px=300", "crop_px 300 is larger than resize_px 64"),
        ("schedule.milestones=[60, 30]", "ascending order"),
        ("data.cache=disk", "data.cache: Invalid enum value 'disk'; it is one of none, ram, gpu, auto"),
        ("data.deterministic=1", "data.deterministic: Expected `bool`, got `int`"),
        ("data.max_decoded_gb=0.05", "data.max_decoded_gb: Expected `float` >= 0.1"),
        ("data.max_decoded_gb=1001", "data.max_decoded_gb: Expected `float` <= 1000.0"),
        ("schedule.scaling=sqrt", "scaling sqrt needs reference_batch"),
        ("optimizer.bias_and_norm_rate=0", "optimizer.bias_and_norm_rate: Expected `float` > 0.0"),
        ("model.stem_kernel=4", "stem_kernel must be odd, not 4"),
        ("model.stem_kernel=13", "model.stem_kernel: Expected `int` <= 11"),
        ("model.groups=3", "model.groups: Invalid enum value 3"),
        ("model.norm=batch", "model.norm: Invalid enum value 'batch'; it is one of"),
        ("model.hidden_norm=true", "hidden_norm needs batch normalisation: set norm to bn or bn_after_relu"),
        ("model.norm_batch=32", "norm_batch is for batch normalisation"),
        ("model.norm_batch=1", "model.norm_batch: Expected `int` >= 2"),
        ("model.pool_padding=2", "model.pool_padding: Invalid enum value 2"),
        ("model={name=\"owt\", norm=\"bn\"}", "norm=bn goes with name=paper and groups=1"),
        ("epochs", "--set takes dotted.key=value"),
        ('recipe="a', "is not a TOML value"),
    ],
)  # fmt: skip
def test_wrong_key_or_value_error_says_what_is_right(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config("tiny-imagenet", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_beat_the_recipe_and_the_recipe_defaults() -> None:
    config = make_config("demo", ["epochs=3", "data.backend=pillow", "micro_batch=16"])
    assert (config.epochs, config.data.backend, config.micro_batch) == (3, "pillow", 16)
    assert config.model.stem_stride == 2
    assert config.optimizer.momentum == RunConfig().optimizer.momentum


def test_unknown_recipe_error_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'tiny-imagenet'"):
        make_config("tinyimagenet")
    with pytest.raises(UserError, match=r"does not exist"):
        make_config(str(tmp_path / "my.toml"))
    (tmp_path / "my.toml").write_text("epochs = = 3")
    with pytest.raises(UserError, match=r"cannot be read.*line 1"):
        make_config(str(tmp_path / "my.toml"))


def test_printed_configuration_is_a_recipe(tmp_path: Path) -> None:
    config = make_config("demo", ["seed=7"], Path("some where"))
    (tmp_path / "config.json").write_text(to_json(config))
    assert make_config(str(tmp_path / "config.json")) == config
    (tmp_path / "config.json").write_text("\ufeff" + to_json(config))  # as an editor on Windows saves it
    assert make_config(str(tmp_path / "config.json")) == config
    (tmp_path / "config.json").rename(tmp_path / "CONFIG.JSON")
    assert make_config(str(tmp_path / "CONFIG.JSON")) == config


@given(
    st.builds(
        dict,
        seed=st.integers(0, 2**62),
        epochs=st.integers(1, 1000),
        global_batch=st.integers(1, 65536),
        precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        schedule=st.builds(dict, learning_rate=st.floats(1e-6, 10), warmup_epochs=st.floats(0, 10)),
    )
)
def test_configuration_round_trips(values: dict[str, object]) -> None:
    config = decode_config(values)
    assert decode_config(msgspec.json.decode(to_json(config))) == config
