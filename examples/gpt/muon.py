# The same language model with two optimizers: Muon updates the weight matrices of the blocks, and AdamW all other parameters.
#   stratagem train examples/gpt/muon.py
_base_ = "config.py"

optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(
        type="MixedOptimizer",
        parts=dict(
            muon=dict(type="Muon", lr=0.04, weight_decay=0.1),
            adamw=dict(type="AdamW", lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ),
        hidden_matrices="muon",
        others="adamw",
    ),
    clip_grad=dict(max_norm=1.0),
)
work_dir = "work_dirs/gpt_muon"
