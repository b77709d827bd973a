import subprocess
import sys

import pytest

CONFIG_FIRST = "import dq_torchao; assert 'diffusers' not in sys.modules; from diffusers.quantizers import auto"
DIFFUSERS_FIRST = "from diffusers.quantizers import auto; import dq_torchao; dq_torchao.register_when_imported()"


@pytest.mark.parametrize("order", [CONFIG_FIRST, DIFFUSERS_FIRST])
def test_the_entry_is_made_once_in_either_order(order):
    code = f"""
import sys
{order}
from diffusers.quantizers.torchao import TorchAoHfQuantizer
entry = auto.AUTO_QUANTIZER_MAPPING["torchao"]
assert entry.chooses_plan_quantizer
assert entry.__closure__[0].cell_contents is TorchAoHfQuantizer
assert not any(type(finder).__module__ == "dq_torchao.diffusers_hook" for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
