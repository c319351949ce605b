"""How far results may be apart in tests: limits of `cvx_deploy.measure.thresholds`, and those that tests alone need."""

from cvx_deploy.measure.thresholds import THRESHOLDS

NETWORK_RELATIVE = THRESHOLDS["fp32"].relative_max
"""Largest error of one fp32 network over its largest value; every contract states it."""

BF16_RELATIVE = 5e-2
"""Largest error of one bf16 network over its largest value: 8 bits a product, over tens of layers."""

PIXELS_ABSOLUTE = 1e-3
"""Largest error of a pixel in [0, 1] after a whole fp32 pipeline: a quarter of an 8-bit step."""

PIXELS_PSNR = THRESHOLDS["fp32"].psnr
"""Least PSNR in dB of a whole fp32 video."""

TF32_RELATIVE = THRESHOLDS["tf32"].relative_max
"""Largest error of one fp32 network on a GPU over its largest value."""

TF32_PSNR = THRESHOLDS["tf32"].psnr
"""Least PSNR in dB of a whole fp32 video made on a GPU."""

HALF_ROUNDING = 2**-10
"""Largest error of one float16 operator over its largest value: two roundings to 11 bits."""

REWRITE_RELATIVE = {"fp32": 1e-6, "fp16": 5e-3}
"""Largest difference a rewrite makes over the largest value: sums in another order; in fp16 a network's roundings."""

PLANNED_MEMORY = 0.15
"""Largest relative error of a predicted amount of memory: arenas grow in steps, kernels' own workspace is not known."""

INT8_RELATIVE = 2e-2
"""Largest difference of two engines' int8 network over its largest value: other sums round to other steps."""

CALIBRATION_GAIN = 1.0
"""Least dB that a table of steps brings a video of 12 steps nearer to the full run than the mask that needs none."""

FORECAST_ROUNDING = 2e-5
"""Largest error of a forecast of values of about 1: a few float32 products, weighted by up to 10 far from the known."""

ROUNDED_OTHERWISE = 2e-3
"""Largest share of half-precision values that differ, by one step: float32 values 5e-7 apart on two sides of a tie."""

WINDOWS_RELATIVE = 2e-4
"""Largest difference of latents averaged over windows here and by hand over the largest value: float32 sums in another
order, through two steps of a network."""

LOOP_PSNR = 30.0
"""Least PSNR in dB of a loop's last frame and its first, and of one loop decoded from two beginnings."""

PROCESSES_RELATIVE = 2e-3
"""Largest difference of an adapter that two processes trained from that of one, over its largest value: gradients are
summed in another order, and Adam, which divides by their size, makes steps of what rounding left of the smallest; 2e-4
were seen after 6 steps at 1e-2."""
