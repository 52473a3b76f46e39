"""Only in a process that has had TRITON_INTERPRET=1 from its start: tests/test_step_triton.py begins one."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]
