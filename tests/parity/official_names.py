"""Names of the released detectron2-layout checkpoints -> names of our modules."""

import re

# (pattern at the start of an official name, our name for it). A number {n} is the official one
# plus the last column: detectron2 counts convolutions from 1 and pyramid levels from 2.
RULES = [
    (r"backbone\.bottom_up\.encoder\.patch_embed\.proj\.(\d)\.", "backbone.stem.stage{n}.", 1),
    (r"backbone\.bottom_up\.encoder\.", "backbone.encoder.", 0),
    (r"backbone\.bottom_up\.decoder\.decoder_embed\.", "backbone.decoder.embed.", 0),
    (r"backbone\.bottom_up\.decoder\.conv_feat_proj\.", "backbone.decoder.stem_proj.", 0),
    (r"backbone\.bottom_up\.decoder\.mask_token", "backbone.decoder.mask_token", 0),
    (r"backbone\.bottom_up\.decoder\.decoder_", "backbone.decoder.", 0),
    (r"backbone\.fpn_lateral(\d)\.norm\.", "neck.pyramid.inner_blocks.{n}.1.", -2),
    (r"backbone\.fpn_output(\d)\.norm\.", "neck.pyramid.layer_blocks.{n}.1.", -2),
    (r"backbone\.fpn_lateral(\d)\.", "neck.pyramid.inner_blocks.{n}.0.", -2),
    (r"backbone\.fpn_output(\d)\.", "neck.pyramid.layer_blocks.{n}.0.", -2),
    (r"proposal_generator\.rpn_head\.conv\.conv(\d)\.", "rpn.head.conv.{n}.0.", 0),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits.", 0),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred.", 0),
    (r"roi_heads\.box_head\.conv(\d)\.norm\.", "roi_heads.box_head.features.{n}.1.", -1),
    (r"roi_heads\.box_head\.conv(\d)\.", "roi_heads.box_head.features.{n}.0.", -1),
    (r"roi_heads\.box_head\.fc1\.", "roi_heads.box_head.features.5.", 0),
    (r"roi_heads\.box_predictor\.", "roi_heads.box_head.", 0),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.norm\.", "roi_heads.mask_head.features.{n}.1.", -1),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", "roi_heads.mask_head.features.{n}.0.", -1),
    (r"roi_heads\.mask_head\.deconv\.", "roi_heads.mask_head.predictor.conv5_mask.", 0),
    (r"roi_heads\.mask_head\.predictor\.", "roi_heads.mask_head.predictor.mask_fcn_logits.", 0),
]


def our_name(official: str) -> str:
    """The name of one official tensor in our detector. KeyError for a name we do not know."""
    for pattern, ours, offset in RULES:
        found = re.match(pattern, official)
        if found:
            number = int(found[1]) + offset if found.groups() else None
            return ours.format(n=number) + official[found.end() :]
    raise KeyError(official)
