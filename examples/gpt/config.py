# A character-level language model with 4.8 million parameters, trained on the King James Bible.
#   stratagem train examples/gpt/config.py                            on one device
#   stratagem train examples/gpt/config.py --nproc 2                  the same with DDP, in two processes
#   stratagem train examples/gpt/config.py --nproc 2 --strategy fsdp  the same with FSDP
#   stratagem sample examples/gpt/config.py work_dirs/gpt --prompt "In the beginning"
custom_imports = dict(imports=["gpt", "king_james"])

length = 128
model = dict(type="Gpt", tokens=67, length=length, width=256, blocks=6, heads=4)
tokenizer = dict(type="Characters")

train_dataloader = dict(
    batch_size=16,
    dataset=dict(type="KingJames", length=length, held_out=False),
    collate_fn=dict(type="pad_sequences"),
)
train_cfg = dict(max_iters=600, val_interval=300)

val_dataloader = dict(
    batch_size=64,
    dataset=dict(type="KingJames", length=length, held_out=True),
    collate_fn=dict(type="pad_sequences"),
)
val_cfg = dict()
val_evaluator = dict(type="TokenLoss")

# Apply weight decay only to the weight matrices of the blocks.
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={"token_embedding": no_decay, "position_embedding": no_decay, "lm_head": no_decay},
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(by_epoch=False, interval=300))

randomness = dict(seed=0)
work_dir = "work_dirs/gpt"
