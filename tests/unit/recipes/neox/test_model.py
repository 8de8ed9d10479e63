"""The model's shape, precision, optimizer and clipping."""

import pytest

from .conftest import UPSTREAM


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "hidden_size: 6000\nnum_kv_heads: null",
            "`hidden_size: 6000` is no multiple of `model_parallel_size: 8`|0",
        ),
        ("hidden_size: 6152", "`hidden_size: 6152` is no multiple of `num_attention_heads: 48`"),
        (
            "num_attention_heads: 12\nnum_kv_heads: 12",
            "`num_attention_heads: 12` is no multiple of `model_parallel_size: 8`",
        ),
        ("num_kv_heads: 7", "`num_kv_heads: 7` does not divide"),
        ("num_kv_heads: 4", "`num_kv_heads: 4` is no multiple of `model_parallel_size: 8`"),
        (
            "seq_length: 131072",
            "`seq_length: 131072` is more than `max_position_embeddings: 65536`",
        ),
        ("num_layers: 61", "`attention_config` describes 60 layers, and `num_layers` is 61"),
        ("attention_config: [[flash, 60]]", "`attention_config` is not a list of"),
        ("num_unique_layers: 7", "`num_unique_layers: 7` does not divide"),
        ("num_layers: 0", "`num_layers: 0` must be at least 1"),
        ("num_layers: null", "`num_layers` is missing"),
        (
            "pipe_parallel_size: 64\nmodel_parallel_size: 1\nnum_layers: 60",
            "`pipe_parallel_size: 64` is more than `num_layers: 60`",
        ),
        ("precision: fp16\nbf16: {enabled: true}", "contradicts `precision: fp16`"),
        ("fp16_lm_cross_entropy: true", "`fp16_lm_cross_entropy` works with"),
        ("zero_optimization: {stage: 4}", "needs a `stage` of 0, 1, 2 or 3"),
        ("zero_optimization: null", "`precision: bfloat16` needs `zero_optimization`"),
        (
            "pipe_parallel_size: 2\nzero_optimization: {stage: 2}",
            "ZeRO stage 2 does not work with `pipe_parallel_size: 2`",
        ),
        (
            "moe_num_experts: 8\npipe_parallel_size: 2",
            "experts do not work with pipeline parallelism",
        ),
        ("min_lr: 1.0e-3", "`min_lr: 0.001` is more than the learning rate 0.00016"),
        ("optimizer: {type: Adm}", "`optimizer.type: Adm` is not one of NeoX's"),
        ("lr: 8.0e-6", "`lr` has no effect"),
        ("num_unique_layers: 0", "`num_unique_layers: 0` does not divide"),
        ("fp16: {loss_scale: 0}", "`fp16` needs `enabled`"),
        ("flops_profiler: {profile_step: 1}", "`flops_profiler` needs `enabled`"),
        ("scheduler: {type: WarmupLR}", "`scheduler` needs a `type` and `params`"),
        ("sparsity_config: {block: 16}", "`sparsity_config` does not work with grouped-query"),
        ("attention_config: [[[flsh], all]]", "the unknown kind `flsh`|any"),
    ],
)
def test_what_neox_asserts_is_refused_first(neox, change, message):
    planned = neox(change + "\n")
    if message.endswith("|0"):  # 6000 = 48 x 125 and 8 x 750: nothing to refuse
        assert planned.said() == []
    elif message.endswith("|any"):
        assert any(message[:-4] in line for line in planned.said())
    else:
        planned.problem(message)


def test_an_optimizer_without_type_is_adam(neox):
    assert (
        neox(base={"optimizer": "{params: {lr: 1.0e-4}}"}).config("finetune")["optimizer"]["type"]
        == "Adam"
    )


def test_experts_upstream_refuse_zero_2(neox):
    neox("moe_num_experts: 8\nzero_optimization: {stage: 2}\n", options=UPSTREAM).problem(
        "experts do not work with ZeRO stage 2"
    )


def test_layers_that_do_not_fill_the_stages_evenly_are_warned_about(neox):
    neox("pipe_parallel_size: 8\nmodel_parallel_size: 1\n").problem(
        "`num_layers: 60` is no multiple", "warning"
    )


def test_bfloat16_with_pipeline_needs_fp32_gradients(neox):
    neox("pipe_parallel_size: 2\n").problem("needs gradients in fp32", "warning")
    assert (
        neox("pipe_parallel_size: 2\ndata_types: {grad_accum_dtype: fp32}\n").said("warning") == []
    )


def test_a_missing_optimizer_or_rate_is_warned_about(neox):
    neox(base={"optimizer": None}).problem("`optimizer` is missing", "warning")
    neox(base={"optimizer": "{type: Adam, params: {}}"}).problem(
        "`optimizer.params.lr` is missing", "warning"
    )
    neox(base={"optimizer": "{type: Adam}"}).problem("`optimizer` needs `params`")


def test_run_values_merge_into_the_base_optimizer(neox):
    params = neox("optimizer: {params: {lr: 8.0e-6}}\n").config("finetune")["optimizer"]["params"]

    assert params == {"lr": 8.0e-6, "betas": [0.9, 0.95], "eps": 1.0e-8}


def test_recomputed_keys_of_a_base_are_left_out(neox):
    planned = neox(base={"lr": "1.0e-3", "batch_size": "3"})

    assert not {"lr", "batch_size"} & set(planned.config("finetune"))
    assert "optimizer.params.lr" in planned.decision("config.lr").reason


def test_clipping_of_one_reaches_deepspeed(neox):
    config = neox("gradient_clipping: 1.0\nclip_grad: 1.0\n").config("finetune")

    assert config["gradient_clipping"] == 1.0 and config["deepspeed_extra_args"] == {
        "gradient_clipping": 1.0
    }
    assert "clip_grad" not in config


def test_clipping_left_out_clips_at_neox_default(neox):
    planned = neox("deepspeed_extra_args: {x: 1}\n", base={"gradient_clipping": None})

    assert planned.config("finetune")["deepspeed_extra_args"] == {"x": 1, "gradient_clipping": 1.0}
    assert (
        "DeeperSpeed's default is no clipping"
        in planned.decision("config.deepspeed_extra_args").reason
    )


def test_clip_grad_alone_is_what_was_meant(neox):
    config = neox(base={"gradient_clipping": None, "clip_grad": "0.3"}).config("finetune")

    assert config["gradient_clipping"] == 0.3 and "deepspeed_extra_args" not in config


def test_the_runs_clip_grad_beats_the_bases_gradient_clipping(neox):
    assert neox("clip_grad: 0.3\n").config("finetune")["gradient_clipping"] == 0.3


def test_contradictions_in_clipping(neox):
    neox("clip_grad: 0.3\ngradient_clipping: 0.4\n").problem(
        "`clip_grad: 0.3` has no effect beside"
    )
    neox("deepspeed_extra_args: {gradient_clipping: 0.4}\n").problem(
        "contradicts `gradient_clipping: 0.5`"
    )
    neox("gradient_clipping: 0.0\n").problem("no clipping at all", "warning")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr_decay_iters: -5", "`lr_decay_iters: -5` must be at least 1"),
        ("log_interval: 0", "`log_interval: 0` must be at least 1"),
        ("warmup: 100", "`warmup: 100` must be 0 to 1"),
        ("hidden_dropout: 1.0", "`hidden_dropout: 1` must be 0 to 0.99"),
        ("min_lr: -1.0e-7", "`min_lr: -1e-07` must be at least 0"),
        ("optimizer: {type: Adam, params: {lr: -8.0e-6}}", "lr: -8e-06` is negative"),
        (
            "optimizer: {type: Adam, params: {lr: 8.0e-6, betas: [0.9, 1.0]}}",
            "betas: [0.9, 1.0]` must be at least 0",
        ),
        (
            "optimizer: {type: Adam, params: {lr: 8.0e-6, weight_decay: -0.1}}",
            "weight_decay: -0.1` is negative",
        ),
        ("fp16: {enabled: true}\nbf16: {enabled: true}", "are both enabled"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(neox, line, said):
    neox(f"{line}\n").problem(said)


def test_a_learning_rate_whose_exponent_lost_its_sign_is_remarked(neox):
    neox("optimizer: {type: Adam, params: {lr: 8.0e+6}}\n").problem(
        "is far above what language models", "warning"
    )
