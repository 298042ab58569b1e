"""dspy: its LM over llama-cpp-python's server."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look at the network

import dspy
from steered import CHAT, GREEDY, PLAIN, SERVED, answer, pair, serving, works

models = pair()
with serving(models.given) as address:
    lm = dspy.LM("openai/steered", api_base=address, api_key="none", cache=False, **GREEDY, extra_body=PLAIN)
    models.demand_same("LM", lambda: lm(messages=CHAT)[0], answer)
works("dspy", SERVED)
