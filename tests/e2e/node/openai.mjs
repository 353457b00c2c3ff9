// npm `openai`: chat (stream and whole), completions, responses, models, an error. usage: openai.mjs BASE_URL TOKENS EXTRA_JSON
import OpenAI from "openai";

const [baseURL, tokens, extra] = process.argv.slice(2);
const { query, body, refuses } = JSON.parse(extra);
const prompt = "Tell me about rings, é日🚀, and data: [DONE].";
const messages = [{ role: "user", content: prompt }];
const client = new OpenAI({ baseURL: `${baseURL}/v1`, apiKey: "sk-test", maxRetries: 0, timeout: 20_000 });
const options = { query: { tokens, ...query } };
const found = {};

let text = "";
const times = [];
let last;
for await (const chunk of await client.chat.completions.create(
  { model: "fake-model", messages, stream: true, ...body },
  options,
)) {
  times.push(performance.now() / 1000);
  text += chunk.choices[0]?.delta?.content ?? "";
  last = chunk;
}
const whole = await client.chat.completions.create({ model: "fake-model", messages, ...body }, options);
found.chat = {
  streamed: text,
  whole: whole.choices[0].message.content,
  finish: last.choices[0]?.finish_reason,
  times,
};

text = "";
for await (const event of await client.responses.create(
  { model: "fake-model", input: prompt, stream: true, ...body },
  options,
)) {
  if (event.type === "response.output_text.delta") text += event.delta;
  last = event;
}
found.responses = { streamed: text, last: last.type };

// Only the uvicorn backend refuses on request.
if (refuses) {
  try {
    await client.chat.completions.create({ model: "fake-model", messages, stream: true }, { query: { status: 429 } });
  } catch (error) {
    found.error = { kind: error.constructor.name, status: error.status, body: error.error };
  }
}
console.log(JSON.stringify(found));
