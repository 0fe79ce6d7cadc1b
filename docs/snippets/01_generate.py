"""Continue texts, several samples each."""

import gristmill

llm = gristmill.LLM("miniature")  # the folder of a model, or the small one that is shipped
params = gristmill.SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, n=2)
for output in llm.generate(["Question. What is the capital of Runi?", "Exercise. Ana has 3 apples."], params):
    print(output.prompt, [completion.text for completion in output.outputs])
