"""langchain-community: ChatLlamaCpp and LlamaCpp, whole and streamed."""

from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.llms import LlamaCpp
from steered import BEGINNING, GREEDY, PLAIN, QUESTION, answer, completion, pair, works

models = pair()
# Both classes load the model themselves when they are validated; model_construct leaves that out.
chat = ChatLlamaCpp.model_construct(client=models.given, model_path=models.given.model_path, **GREEDY, **PLAIN)
llm = LlamaCpp.model_construct(
    client=models.given, model_path=models.given.model_path, streaming=False, **GREEDY, **PLAIN
)

models.demand_same("ChatLlamaCpp", lambda: chat.invoke(QUESTION).content, answer)
models.demand_same("ChatLlamaCpp, streamed", lambda: "".join(part.content for part in chat.stream(QUESTION)), answer)
models.demand_same("LlamaCpp", lambda: llm.invoke(BEGINNING), completion)
works("langchain-community", "ChatLlamaCpp.model_construct(client=llm)")
