"""The URLs of published weights that MMEngine-style configurations refer to as ``open-mmlab://name``."""

from __future__ import annotations

__all__ = ["OPEN_MMLAB_URLS"]

_ROOT = "https://download.openmmlab.com"
# A mapping from names to files. All except the last three are in the same folder.
_THIRD_PARTY = {
    "vgg16_caffe": "vgg16_caffe-292e1171.pth",
    "detectron/resnet50_caffe": "resnet50_caffe-788b5fa3.pth",
    "detectron2/resnet50_caffe": "resnet50_msra-5891d200.pth",
    "detectron/resnet101_caffe": "resnet101_caffe-3ad79236.pth",
    "detectron2/resnet101_caffe": "resnet101_msra-6cc46731.pth",
    "detectron2/resnext101_32x8d": "resnext101_32x8d-1516f1aa.pth",
    "resnext50_32x4d": "resnext50-32x4d-0ab1a123.pth",
    "resnext101_32x4d": "resnext101_32x4d-a5af3160.pth",
    "resnext101_64x4d": "resnext101_64x4d-ee2c6f71.pth",
    "contrib/resnet50_gn": "resnet50_gn_thangvubk-ad1730dd.pth",
    "detectron/resnet50_gn": "resnet50_gn-9186a21c.pth",
    "detectron/resnet101_gn": "resnet101_gn-cac0ab98.pth",
    "jhu/resnet50_gn_ws": "resnet50_gn_ws-15beedd8.pth",
    "jhu/resnet101_gn_ws": "resnet101_gn_ws-3e3c308c.pth",
    "jhu/resnext50_32x4d_gn_ws": "resnext50_32x4d_gn_ws-0d87ac85.pth",
    "jhu/resnext101_32x4d_gn_ws": "resnext101_32x4d_gn_ws-34ac1a9e.pth",
    "jhu/resnext50_32x4d_gn": "resnext50_32x4d_gn-c7e8b754.pth",
    "jhu/resnext101_32x4d_gn": "resnext101_32x4d_gn-ac3bb84e.pth",
    "msra/hrnetv2_w18_small": "hrnetv2_w18_small-b5a04e21.pth",
    "msra/hrnetv2_w18": "hrnetv2_w18-00eb2006.pth",
    "msra/hrnetv2_w32": "hrnetv2_w32-dc9eeb4f.pth",
    "msra/hrnetv2_w40": "hrnetv2_w40-ed0b031c.pth",
    "msra/hrnetv2_w48": "hrnetv2_w48-d2186c55.pth",
    "bninception_caffe": "bn_inception_caffe-ed2e8665.pth",
    "kin400/i3d_r50_f32s2_k400": "i3d_r50_f32s2_k400-2c57e077.pth",
    "kin400/nl3d_r50_f32s2_k400": "nl3d_r50_f32s2_k400-fa7e7caa.pth",
    "res2net101_v1d_26w_4s": "res2net101_v1d_26w_4s_mmdetv2-f0a600f9.pth",
    "regnetx_400mf": "regnetx_400mf-a5b10d96.pth",
    "regnetx_800mf": "regnetx_800mf-1f4be4c7.pth",
    "regnetx_1.6gf": "regnetx_1.6gf-5791c176.pth",
    "regnetx_3.2gf": "regnetx_3.2gf-c2599b0f.pth",
    "regnetx_4.0gf": "regnetx_4.0gf-a88f671e.pth",
    "regnetx_6.4gf": "regnetx_6.4gf-006af45d.pth",
    "regnetx_8.0gf": "regnetx_8.0gf-3c68abe7.pth",
    "regnetx_12gf": "regnetx_12gf-4c2a3350.pth",
    "resnet18_v1c": "resnet18_v1c-b5776b93.pth",
    "resnet50_v1c": "resnet50_v1c-2cccc1ad.pth",
    "resnet101_v1c": "resnet101_v1c-e67eebb6.pth",
    "resnest50": "resnest50_d2-7497a55b.pth",
    "resnest101": "resnest101_d2-f3b931b2.pth",
    "resnest200": "resnest200_d2-ca88e41f.pth",
    "darknet53": "darknet53-a628ea1b.pth",
}
OPEN_MMLAB_URLS = {
    **{name: f"{_ROOT}/pretrain/third_party/{file}" for name, file in _THIRD_PARTY.items()},
    "mmedit/vgg16": f"{_ROOT}/mmediting/third_party/vgg_state_dict.pth",
    "mmedit/res34_en_nomixup": f"{_ROOT}/mmediting/third_party/model_best_resnet34_En_nomixup.pth",
    "mmedit/mobilenet_v2": f"{_ROOT}/mmediting/third_party/mobilenet_v2.pth",
}
