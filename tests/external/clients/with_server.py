"""llama_cpp.server with the openai client: chats whole and streamed, completions, log-probabilities."""

from openai import OpenAI
from steered import BEGINNING, CHAT, GREEDY, PLAIN, SERVED, answer, completion, pair, serving, works

models = pair(logits_all=True)
with serving(models.given) as address, OpenAI(base_url=address, api_key="none") as client:

    def chat(**more):
        return client.chat.completions.create(model="steered", messages=CHAT, **GREEDY, extra_body=PLAIN, **more)

    models.demand_same("chat", lambda: chat().choices[0].message.content, answer)
    models.demand_same(
        "chat, streamed", lambda: "".join(part.choices[0].delta.content or "" for part in chat(stream=True)), answer
    )
    models.demand_same(
        "completion",
        lambda: (
            client.completions.create(model="steered", prompt=BEGINNING, **GREEDY, extra_body=PLAIN).choices[0].text
        ),
        completion,
    )
works("openai", SERVED)
