"""All ops that are timed, by name."""

import linear_variants
import variants

OPS = {**variants.OPS, **linear_variants.OPS}
