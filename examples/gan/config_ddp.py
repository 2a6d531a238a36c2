# Wrap each network in a separate DistributedDataParallel: an update of one network produces no gradients for the other.
_base_ = "config.py"
strategy = dict(type="DDPStrategy", model_wrapper="separate")
