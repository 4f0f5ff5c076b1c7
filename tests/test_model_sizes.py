"""Models by name: their parameters against the published counts, and the lookups that command lines use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alpa_like import models

# What each source counts, to the last one.
PUBLISHED = {
    # the files that OpenAI published (model_card.md says 124M, 355M, 774M and 1.5B)
    ("gpt", "124M"): 124_439_808,
    ("gpt", "355M"): 354_823_168,
    ("gpt", "774M"): 774_030_080,
    ("gpt", "1558M"): 1_557_611_200,
    # torchvision's docs; Ti and S: timm's deit_tiny and deit_small
    ("vit", "Ti/16"): 5_717_416,
    ("vit", "S/16"): 22_050_664,
    ("vit", "B/32"): 88_224_232,
    ("vit", "B/16"): 86_567_656,
    ("vit", "L/32"): 306_535_400,
    ("vit", "L/16"): 304_326_632,
    ("vit", "H/14"): 632_045_800,
    # the published checkpoints of Llama 2, Llama 3, Llama 3.1 (405B) and TinyLlama
    ("llama", "1.1B"): 1_100_048_384,
    ("llama", "7B"): 6_738_415_616,
    ("llama", "13B"): 13_015_864_320,
    ("llama", "8B"): 8_030_261_248,
    ("llama", "70B"): 70_553_706_496,
    ("llama", "405B"): 405_853_388_800,
    # the authors' checkpoints; the paper says 35.7M and 114M (Ho et al. 2020, appendix B)
    ("unet", "cifar10"): 35_746_307,
    ("unet", "lsun"): 113_673_219,
    # torchvision's resnet50 and resnet101
    ("wide_resnet", "50"): 25_557_032,
    ("wide_resnet", "101"): 44_549_160,
    # Zagoruyko & Komodakis 2016, table 4: 11.0M and 36.5M
    ("resnet", "16-8"): 10_961_370,
    ("resnet", "28-10"): 36_479_194,
}


def count(family: str, size: str, **options: Any) -> int:
    """Parameters that `init` makes."""
    task = models.task(family, size, batch_size=1, **options)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init).params))


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_closed_forms_give_the_published_counts(family: str, size: str) -> None:
    assert models.config(family, size).num_params() == PUBLISHED[family, size]


@pytest.mark.parametrize(("size", "published"), [("base", 109_514_298), ("large", 335_174_458)])
def test_bert_has_the_published_count_but_for_the_segments(size: str, published: int) -> None:
    """Of transformers' BertForMaskedLM. The paper's 110M and 340M also have a pooler and a next-sentence head."""
    config = models.config("bert", size)
    assert config.num_params() + 2 * config.d_model == published


@pytest.mark.parametrize(("family", "size"), [("gpt", "1558M"), ("vit", "H/14"), ("llama", "405B")])
def test_published_counts_are_what_init_makes(family: str, size: str) -> None:
    assert count(family, size, scan_layers=True) == PUBLISHED[family, size]


@pytest.mark.parametrize("family", models.SIZES)
def test_every_family_has_a_tiny_and_a_laptop_size(family: str) -> None:
    """Below 200 thousand and 20 million parameters; the tiny one as init makes it."""
    assert count(family, "tiny") == models.config(family, "tiny").num_params() < 2e5
    assert 1e6 < models.config(family, "laptop").num_params() < 2e7


def test_tasks_take_their_name_batch_and_options() -> None:
    task = models.task("gpt", "350M", batch_size=24, dtype="bfloat16", seq_len=64, num_layers=2)
    assert task.name == "gpt 350M"
    assert task.abstract_batch()["tokens"].shape == (24, 64)
    state = jax.eval_shape(task.init)
    assert "h2" not in state.params
    tokens = jnp.zeros((1, 64), int)
    assert jax.eval_shape(state.apply_fn, {"params": state.params}, tokens).dtype == jnp.bfloat16
    assert {name: task.name for name, task in models.tiny_tasks().items()} == {f: f"{f} tiny" for f in models.SIZES}


def test_sizes_of_the_paper_are_the_same_configs() -> None:
    assert models.SIZES["gpt"]["39B"] == models.paper_gpt_config("39B")
    assert models.SIZES["moe"]["70B"] == models.paper_moe_config("70B")
    assert models.SIZES["wide_resnet"]["13B"] == models.paper_wide_resnet_config("13B")
    assert models.config("llama", "8B", remat=True) == models.LlamaConfig.llama_8b()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("gtp", "350M"), {}, "no family of models is named 'gtp'; choose one of mlp, gpt, bert, .*, wide_resnet"),
        (("gpt", "350m"), {}, "no size of gpt is named '350m'; choose one of tiny, laptop, 124M, .*, 39B"),
        (
            ("vit", "B/16"),
            {"seq_len": 8},
            "no option of ViTConfig is named 'seq_len'; choose one of image_size, .*remat",
        ),
        (("vit", "B/16"), {"dtype": "int8"}, "dtype must be a floating one such as float32.*, found 'int8'"),
        (("vit", "B/16"), {"dtype": "fp16"}, "dtype must be a floating one such as float32.*, found 'fp16'"),
        (("vit", "B/16"), {"batch_size": 0}, "batch_size must be a whole number of at least 1, found 0"),
        (("gpt", "tiny"), {"num_layers": -1}, "GPTConfig: num_layers must be a whole number of at least 1, found -1"),
        (("gpt", "tiny"), {"seq_len": "7"}, "GPTConfig: seq_len must be a whole number of at least 1, found '7'"),
        (("bert", "tiny"), {"dropout_rate": 1.5}, "dropout_rate must be at least 0 and less than 1, found 1.5"),
        (("bert", "tiny"), {"mask_id": 99}, "mask_id must be a token of the vocabulary; found mask_id 99, vocab_size"),
        (("mlp", "tiny"), {"activation": "x"}, "activation must be one of relu, gelu, tanh, found 'x'"),
        (("vit", "B/16"), {"batch_size": 1.5}, "batch_size must be a whole number of at least 1, found 1.5"),
        (("vit", "B/16"), {"batch_size": "8"}, "batch_size must be a whole number of at least 1, found '8'"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known_ones(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.task(*arguments, **options)


def test_tiny_batches_split_over_eight_devices() -> None:
    for task in models.tiny_tasks().values():
        assert all(x.shape[0] % 8 == 0 for x in jax.tree.leaves(task.abstract_batch()))
        assert np.shape(next(iter(task.batch(0).values())))[0] == 16
