//! The demo model's answers, read as a client reads them: blocks decoded, JSON parsed, streamed text against whole.
//! Apart from `demo.rs` because the shapes of four dialects make a long file.

use super::*;
use crate::dialect::Meaning;
use crate::sse::Decoder;
use serde_json::{Value as Json, json};

const TIME_S: u64 = 1_760_000_000;

fn demo(dialect: Dialect, tokens: u32, facts: &RequestFacts, seed: u64) -> DemoModel {
    DemoModel::new(dialect, DemoSettings { tokens, ..DemoSettings::default() }, facts, seed, TIME_S)
}

/// Every block of an answer with its meaning and its event name; JSON null for `[DONE]`.
fn stream(model: &mut DemoModel) -> Vec<(Meaning, String, Json)> {
    let dialect = model.dialect;
    let mut blocks = Vec::new();
    let mut calls = 0;
    let mut take = |bytes: &[u8]| {
        let mut input = bytes;
        let mut decoder = Decoder::new(1 << 20);
        let block = decoder.next(&mut input).unwrap().expect("out gets whole blocks");
        assert!(input.is_empty() && block.raw.len() == bytes.len(), "one block at a time");
        assert_eq!(block.data_lines().count(), 1);
        let data = block.data_lines().next().unwrap();
        let json =
            if data == b"[DONE]" { Json::Null } else { serde_json::from_slice(data).expect("data is JSON") };
        let name = String::from_utf8(block.event().unwrap_or_default().to_vec()).unwrap();
        blocks.push((dialect.meaning(&block), name, json));
    };
    model.write_preamble(&mut take);
    while model.write_next(&mut take) {
        calls += 1;
    }
    assert_eq!(calls + 1, model.tokens.max(1), "a call for each token");
    assert!(!model.write_next(&mut |_| panic!("nothing follows the end")));
    blocks
}

/// The data of the blocks that carry tokens; the plain dialect's `done` is an event like any other to a proxy.
fn token_blocks(blocks: &[(Meaning, String, Json)]) -> impl Iterator<Item = &Json> {
    let carries =
        |(meaning, name, _): &&(Meaning, String, Json)| *meaning == Meaning::Token && name != "done";
    blocks.iter().filter(carries).map(|(_, _, json)| json)
}

fn text(blocks: &[(Meaning, String, Json)], pointer: &str) -> String {
    token_blocks(blocks).map(|json| json.pointer(pointer).and_then(Json::as_str).expect("a piece")).collect()
}

#[test]
fn every_dialect_streams_the_text_that_it_answers_whole() {
    for (dialect, piece, whole) in [
        (Dialect::Chat, "/choices/0/delta/content", "/choices/0/message/content"),
        (Dialect::Completions, "/choices/0/text", "/choices/0/text"),
        (Dialect::Responses, "/delta", "/output/0/content/0/text"),
        (Dialect::Messages, "/delta/text", "/content/0/text"),
        (Dialect::Plain, "/token", "/text"),
    ] {
        for max_tokens in [None, Some(0), Some(1), Some(30), Some(10_000)] {
            let facts = RequestFacts { max_tokens, ..RequestFacts::default() };
            let blocks = stream(&mut demo(dialect, 200, &facts, 7));
            let answer: Json = serde_json::from_slice(&demo(dialect, 200, &facts, 7).whole_answer()).unwrap();
            let text = text(&blocks, piece);
            assert_eq!(answer.pointer(whole).unwrap().as_str(), Some(&text[..]), "{dialect:?}");
            assert_eq!(token_blocks(&blocks).count(), max_tokens.unwrap_or(200).min(200) as usize);
            let done = blocks.iter().filter(|(meaning, ..)| *meaning == Meaning::Done).count();
            assert_eq!(done, usize::from(dialect.has_end_mark()), "{dialect:?}");
            if dialect.has_end_mark() {
                assert_eq!(blocks.last().unwrap().0, Meaning::Done, "{dialect:?}");
            }
        }
    }
}

#[test]
fn chat_chunks_are_one_answer() {
    let facts = RequestFacts { model: Some("a \"b\"".into()), ..RequestFacts::default() };
    let blocks = stream(&mut demo(Dialect::Chat, 20, &facts, 1));
    let chunks: Vec<&Json> = blocks.iter().map(|(_, _, json)| json).filter(|json| !json.is_null()).collect();
    assert_eq!(chunks.len(), 22);
    for chunk in &chunks {
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["created"], TIME_S);
        assert_eq!(chunk["model"], "a \"b\"");
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
        assert!(chunk.get("usage").is_none());
    }
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(chunks[21]["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunks[20]["choices"][0]["finish_reason"], Json::Null);
}

#[test]
fn usage_comes_when_asked_for_and_a_maximum_cuts() {
    let facts = RequestFacts { include_usage: Some(true), max_tokens: Some(5), ..RequestFacts::default() };
    for dialect in [Dialect::Chat, Dialect::Completions] {
        let blocks = stream(&mut demo(dialect, 20, &facts, 1));
        let (_, _, usage) = &blocks[blocks.len() - 2];
        assert_eq!(usage["choices"], json!([]));
        assert_eq!(usage["usage"], json!({"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13}));
        let (_, _, finish) = &blocks[blocks.len() - 3];
        assert_eq!(finish["choices"][0]["finish_reason"], "length");
        assert_eq!(finish["usage"], Json::Null);
        assert!(finish.get("usage").is_some());
    }
}

#[test]
fn responses_events_are_numbered_and_complete() {
    for (max_tokens, last, status) in
        [(None, "response.completed", "completed"), (Some(4), "response.incomplete", "incomplete")]
    {
        let facts = RequestFacts { max_tokens, ..RequestFacts::default() };
        let blocks = stream(&mut demo(Dialect::Responses, 6, &facts, 3));
        for (index, (_, name, json)) in blocks.iter().enumerate() {
            assert_eq!(json["sequence_number"], index);
            assert_eq!(json["type"], **name);
        }
        let names: Vec<&str> = blocks.iter().map(|(_, name, _)| &name[..]).collect();
        let tokens = max_tokens.unwrap_or(6) as usize;
        assert_eq!(
            names[..4],
            [
                "response.created",
                "response.in_progress",
                "response.output_item.added",
                "response.content_part.added"
            ]
        );
        assert!(names[4..4 + tokens].iter().all(|name| *name == "response.output_text.delta"));
        assert_eq!(
            names[4 + tokens..],
            ["response.output_text.done", "response.content_part.done", "response.output_item.done", last]
        );
        let response = &blocks.last().unwrap().2["response"];
        assert_eq!(response["status"], status);
        assert_eq!(response["id"], blocks[0].2["response"]["id"]);
        assert_eq!(response["output"][0], blocks[blocks.len() - 2].2["item"]);
        assert_eq!(response["usage"]["output_tokens"], tokens);
        assert_eq!(response["output"][0]["content"][0]["text"], text(&blocks, "/delta"));
        for (_, _, json) in &blocks[4..blocks.len() - 2] {
            assert_eq!(json["item_id"], response["output"][0]["id"]);
        }
    }
}

#[test]
fn messages_events_come_in_their_order() {
    for (max_tokens, reason) in [(None, "end_turn"), (Some(2), "max_tokens")] {
        let facts = RequestFacts { max_tokens, ..RequestFacts::default() };
        let blocks = stream(&mut demo(Dialect::Messages, 3, &facts, 3));
        let tokens = max_tokens.unwrap_or(3) as usize;
        let names: Vec<&str> = blocks.iter().map(|(_, name, _)| &name[..]).collect();
        assert_eq!(names[..3], ["message_start", "content_block_start", "ping"]);
        assert!(names[3..3 + tokens].iter().all(|name| *name == "content_block_delta"));
        assert_eq!(names[3 + tokens..], ["content_block_stop", "message_delta", "message_stop"]);
        assert_eq!(blocks[0].2["message"]["content"], json!([]));
        assert_eq!(blocks[0].2["message"]["usage"]["input_tokens"], 8);
        let delta = &blocks[blocks.len() - 2].2;
        assert_eq!(delta["delta"], json!({"stop_reason": reason, "stop_sequence": null}));
        assert_eq!(delta["usage"]["output_tokens"], tokens);
        assert!(blocks.iter().all(|(_, name, json)| json["type"] == **name));
    }
}

#[test]
fn seeds_decide_text_and_ids() {
    let facts = RequestFacts::default();
    let answer = |seed| demo(Dialect::Chat, 100, &facts, seed).whole_answer();
    assert_eq!(answer(1), answer(1));
    assert_ne!(answer(1), answer(2));
    let id = |seed| serde_json::from_slice::<Json>(&answer(seed)).unwrap()["id"].clone();
    assert_ne!(id(1), id(2));
}

#[test]
fn a_token_needs_no_memory_of_its_own() {
    for dialect in Dialect::ALL {
        let mut model = demo(dialect, 1000, &RequestFacts::default(), 9);
        model.write_preamble(&mut |_| {});
        model.write_next(&mut |_| {});
        let (capacity, place) = (model.block.capacity(), model.block.as_ptr());
        for _ in 0..900 {
            model.write_next(&mut |_| {});
        }
        assert_eq!((model.block.capacity(), model.block.as_ptr()), (capacity, place), "{dialect:?}");
    }
}

#[test]
fn queries_override_within_range() {
    let settings = DemoSettings::default();
    assert_eq!(settings.with_query(None), Ok(settings.clone()));
    assert_eq!(settings.with_query(Some("")), Ok(settings.clone()));
    assert_eq!(
        settings.with_query(Some("a=b&tokens=7&first_token_ms=0&tokens_per_s=1000&tokens=8")),
        Ok(DemoSettings { tokens_per_s: 1000, first_token_ms: 0, tokens: 8 })
    );
    for query in
        ["tokens=0", "tokens=", "tokens", "tokens=1e3", "tokens=+5", "tokens=100001", "tokens=99999999999"]
    {
        let error = settings.with_query(Some(query)).unwrap_err();
        assert_eq!(error, "query parameter tokens: expected a whole number from 1 to 100000", "{query}");
    }
    assert!(settings.with_query(Some("tokens_per_s=0")).unwrap_err().contains("from 1 to 100000"));
    assert!(settings.with_query(Some("first_token_ms=600001")).unwrap_err().contains("from 0 to 600000"));
}

#[test]
fn the_model_list_is_json() {
    let models: Json = serde_json::from_slice(&models_json(TIME_S)).unwrap();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], MODEL_NAME);
    assert_eq!(models["data"][0]["created"], TIME_S);
}
