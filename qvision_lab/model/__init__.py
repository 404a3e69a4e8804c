"""The captioner, file by file: pixels -> image tokens -> visual tokens -> words.

What happens in `captioner.caption("x.jpg")`, which lives in `qvision_lab.captioning`:

1. `processor.py`: the opened image becomes `pixel_values` [B,3,H,W] (`resize`, `normalise`).
2. `captioner.py`: these enter the model once, in `encode`, which runs the next two stages.
3. `vision.py`: `pixel_values` -> image tokens [B,P,D].
4. `qformer.py`: image tokens -> visual tokens [B,1+Q,D].
5. `decoder.py`: visual tokens and the words so far -> logits, once for each word. `captioning`
   computes this step over fixed buffers (`decoding_step.py`), or calls `generate` (rare settings).
6. `processor.py`: the chosen ids become text (`decode`).

`config.py` has all sizes; `attention.py` serves stages 4 and 5. Beyond this path are `variants.py`
(replacements of stages for ablations), `towers.py` (vision towers besides CLIP's), `parameters.py`
(sizes of the parts) and `loading/`.
"""
