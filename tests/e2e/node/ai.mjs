// npm `ai` with `@ai-sdk/openai-compatible`: streamText and generateText. usage: ai.mjs BASE_URL QUERY_JSON
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, query] = process.argv.slice(2);
const prompt = "Tell me about rings, é日🚀, and data: [DONE].";
const provider = createOpenAICompatible({
  name: "tokenring",
  baseURL: `${baseURL}/v1`,
  apiKey: "sk-test",
  includeUsage: true,
  queryParams: JSON.parse(query),
});
const model = provider("fake-model");

const answer = streamText({ model, prompt, maxRetries: 0 });
let streamed = "";
const times = [];
for await (const part of answer.textStream) {
  times.push(performance.now() / 1000);
  streamed += part;
}
const usage = await answer.usage;
const finish = await answer.finishReason;
const whole = await generateText({ model, prompt, maxRetries: 0 });

// An error of the backend in mid-stream arrives as a part, not as an exception.
const failing = createOpenAICompatible({
  name: "tokenring",
  baseURL: `${baseURL}/v1`,
  queryParams: { tokens: "8", error_after: "3" },
});
const errors = [];
for await (const part of streamText({
  model: failing("fake-model"),
  prompt,
  maxRetries: 0,
  onError: () => {},
}).fullStream) {
  if (part.type === "error") errors.push(String(part.error?.message ?? JSON.stringify(part.error)));
}
console.log(JSON.stringify({ streamed, whole: whole.text, times, finish, tokens: usage.outputTokens, errors }));
