// npm `@anthropic-ai/sdk`: messages (stream and whole), an error. usage: anthropic.mjs BASE_URL TOKENS EXTRA_JSON
import Anthropic from "@anthropic-ai/sdk";

const [baseURL, tokens, extra] = process.argv.slice(2);
const { query, body, refuses } = JSON.parse(extra);
const messages = [{ role: "user", content: "Tell me about rings, é日🚀, and data: [DONE]." }];
const client = new Anthropic({ baseURL, apiKey: "sk-test", maxRetries: 0, timeout: 20_000 });
const ask = { model: "fake-model", messages, max_tokens: Number(tokens), ...body };
const options = { query: { tokens, ...query } };
const found = {};

let streamed = "";
const times = [];
const stream = client.messages.stream(ask, options);
stream.on("text", (part) => {
  times.push(performance.now() / 1000);
  streamed += part;
});
const final = await stream.finalMessage();
const whole = await client.messages.create(ask, options);
found.messages = {
  streamed,
  final: final.content[0].text,
  whole: whole.content[0].text,
  times,
  tokens: final.usage.output_tokens,
};

// Only the uvicorn backend refuses on request.
if (refuses) {
  try {
    await client.messages.create({ ...ask, stream: true }, { query: { status: 429 } });
  } catch (error) {
    found.error = { kind: error.constructor.name, status: error.status, body: error.error };
  }
}
console.log(JSON.stringify(found));
