"""The kernels as torch operators, for torch.compile(fullgraph=True) and torch.export.

`import pyguide.ops` registers torch.ops.pyguide.step, .randn and .classifier_grad. The sampler does not use them, it
drives the packed kernels itself. Where a sample stands is data (`samples`), so one traced graph serves every row:

    op = pyguide.ops.operands(sampler, noise, seeds=0)
    written, read = op.written, op.read

    @torch.compile(fullgraph=True)
    def body():                                                      # op.inputs[0] holds the branches, uncond first
        torch.ops.pyguide.step(*written, [net(op.inputs[0], op.times[0])], *read)

    with torch.no_grad():                                            # the step is not differentiable
        torch.ops.pyguide.step(*written, [], *read)                  # row 0: no model output yet
        for _ in range(sampler.plan.evaluations):
            body()                                                   # the result is op.state[0]

Registered with Library.define and impl: a call costs a third of what the custom_op decorator costs.
"""

from .classifier_grad import classifier_grad
from .library import LIBRARY
from .randn import randn
from .step import WORDS, Operands, operands, step

__all__ = ["LIBRARY", "WORDS", "Operands", "classifier_grad", "operands", "randn", "step"]
