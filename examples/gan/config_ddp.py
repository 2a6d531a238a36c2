# Each network is wrapped by itself, since a step of one leaves the other without gradients.
_base_ = "config.py"
strategy = dict(type="DDPStrategy", model_wrapper="separate")
