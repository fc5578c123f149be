"""Low-rank updates of the weights of a network that is not edited.

W becomes W + scale B A wherever the network multiplies by W: the products are formed with the two
factors, not with a dense update. Hu et al., 2022, arXiv:2106.09685. The network is any JAX function
of a pytree; its weights may be stored (in, out), (out, in), with several input or output axes, as
in attention kernels, or stacked over layers. The replacement is an array type of quax, to which the
function applies itself.
"""

from probbp.models.lora.layout import Factors, Layout, named_leaves
from probbp.models.lora.update import apply, merge
from probbp.models.lora.uses import layouts

__all__ = ["Factors", "Layout", "apply", "layouts", "merge", "named_leaves"]
