"""Parameter groups: every parameter that can learn, once, at the right rate."""

from pathlib import Path

from tiny import arguments, tiny_student

from kd_trainer.optim import parameter_groups, unit_parameters


def test_every_parameter_that_is_used_is_in_exactly_one_group(tmp_path: Path):
    """One that is in no group never learns; one in two groups is stepped twice."""
    student = tiny_student("timm-efficientnet-b0")
    groups = parameter_groups(student, arguments(tmp_path))
    grouped = [name for group in groups for name, _ in group["params"]]
    never_used = student.never_used_parameters()
    assert never_used
    assert sorted(grouped) == sorted(
        name for name, _ in student.named_parameters() if name not in never_used
    )


def test_parts_are_the_decoder_and_the_units_deepest_first(tmp_path: Path):
    """The stem has no unit of its own: it is freed with the shallowest one."""
    parts = unit_parameters(tiny_student("timm-efficientnet-b0"))
    shallow = {name.split(".")[1] for name, _ in parts["unit_0"]}
    assert next(iter(parts)) == "decoder"
    units = [int(name.removeprefix("unit_")) for name in list(parts)[1:]]
    assert units == sorted(units, reverse=True)
    assert shallow >= {"conv_stem", "bn1"}
    assert not any(name.startswith("encoder.") for name, _ in parts["decoder"])


def test_rates_and_weight_decay_of_the_groups(tmp_path: Path):
    """Decay on scales and biases pulls normalisation towards zero; the encoder learns slower."""
    args = arguments(tmp_path, learning_rate=1e-4, encoder_lr_scale=0.3, weight_decay=1e-4)
    groups = parameter_groups(tiny_student(), args)
    assert {group["lr"] for group in groups if group["name"] == "decoder"} == {1e-4}
    assert {group["lr"] for group in groups if group["name"] != "decoder"} == {1e-4 * 0.3}
    for group in groups:
        dimensions = {parameter.ndim for _, parameter in group["params"]}
        assert group["weight_decay"] == (0.0 if dimensions == {1} else 1e-4)
        assert dimensions == {1} or 1 not in dimensions
