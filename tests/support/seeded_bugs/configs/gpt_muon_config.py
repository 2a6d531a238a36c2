# The weight matrices of the blocks are updated by Muon, whose rounding errors are those of bfloat16 in every dtype.
_base_ = "gpt_config.py"

model = dict(width=64, length=64, tokens=64)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(
        type="MixedOptimizer",
        parts=dict(muon=dict(type="Muon", lr=0.04, weight_decay=0.1), adamw=dict(type="AdamW", lr=4e-3)),
        hidden_matrices="muon",
        others="adamw",
    ),
    clip_grad=dict(max_norm=0.5),
)
