"""Chat, and the log-probability of an answer."""

import gristmill

llm = gristmill.LLM("miniature")
talk = [{"role": "user", "content": "What is the capital of Runi?"}]
(output,) = llm.chat(talk, gristmill.SamplingParams(temperature=0.0, max_tokens=16))
answer = output.outputs[0]
print(answer.text, answer.finish, sum(answer.logprobs))
((total, tokens),) = llm.loglikelihood([[*talk, {"role": "assistant", "content": "It is Lome."}]])
print(total / tokens, "nats a token")
