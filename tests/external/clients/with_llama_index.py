"""llama-index: its LlamaCPP, completions and chats, whole and streamed."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.llama_cpp import LlamaCPP
from steered import BEGINNING, CHAT, GREEDY, answer, completion, pair, works

models = pair()
# It loads a model of its own: of that, the vocabulary only.
client = LlamaCPP(
    model_path=models.given.model_path,
    model_kwargs={"vocab_only": True},
    max_new_tokens=GREEDY["max_tokens"],
    temperature=GREEDY["temperature"],
    messages_to_prompt=lambda messages: models.given.chat_template.render(
        [{"role": each.role.value, "content": each.content} for each in messages]
    ),
    verbose=False,
)
client._model = models.given
messages = [ChatMessage(role=each["role"], content=each["content"]) for each in CHAT]

models.demand_same("completion", lambda: client.complete(BEGINNING).text, completion)
models.demand_same(
    "completion, streamed", lambda: "".join(part.delta for part in client.stream_complete(BEGINNING)), completion
)
models.demand_same("chat", lambda: client.chat(messages).message.content, answer)
works("llama-index-llms-llama-cpp", "client._model = llm")
