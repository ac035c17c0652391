"""A program that loads model folders as carelessly as can be. Prints what came of each, as JSON.

Run as a module by `programs.run_module` with folders as its arguments.
"""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    came_of = {}
    for folder in sys.argv[1:]:
        for loader in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
            for trust in (True, None):
                try:
                    getattr(transformers, loader).from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
                    came = "loaded"
                except Exception as error:  # whatever it is, it is what the test wants to know
                    came = f"{type(error).__name__}: {error}"
                came_of[f"{folder} {loader} {trust}"] = came
    sys.stdout.write(json.dumps(came_of) + "\n")
