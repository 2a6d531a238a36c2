"""The directory format: a manifest, safetensors files and JSON, written by all ranks and verified when read."""
