use serde_json::{Map, Value, json};
use servelab_text::{ChatInput, ChatTemplate, TextError};

use crate::{fixture, fixture_json};

fn template(name: &str) -> ChatTemplate {
    let source = String::from_utf8(fixture(&format!("templates/{name}"))).unwrap();
    ChatTemplate::new(&source, Some("<|bos|>"), Some("<|end|>")).unwrap()
}

fn compile(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap()
}

fn render(source: &str, messages: &[Value]) -> Result<String, TextError> {
    compile(source).render_at(&ChatInput { messages, ..ChatInput::default() }, 0)
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

/// transformers calls this variable's errors by other names; what counts is that both refuse.
#[test]
fn renderings_equal_those_of_transformers() {
    let all = fixture_json("chat_cases.json");
    let now = all["unix_seconds"].as_i64().unwrap();
    let mut wrong = Vec::new();
    for case in all["cases"].as_array().unwrap() {
        let options = &all["options"][case["options"].as_u64().unwrap() as usize];
        let no_extra = Map::new();
        let input = ChatInput {
            messages: all["conversations"][case["conversation"].as_str().unwrap()].as_array().unwrap(),
            tools: options["tools"].as_array().map(Vec::as_slice),
            documents: None,
            add_generation_prompt: options["add_generation_prompt"].as_bool().unwrap(),
            continue_final_message: options["continue_final_message"] == true,
            extra: options["extra"].as_object().unwrap_or(&no_extra),
        };
        let rendered = template(case["template"].as_str().unwrap()).render_at(&input, now);
        let agrees = match (&rendered, case["expected"].as_str(), case["message"].as_str()) {
            (Ok(text), Some(expected), _) => text == expected,
            (Err(TextError::TemplateRefused { message }), None, Some(expected)) => message == expected,
            (Err(error), None, None) => error.is_request_fault(),
            _ => false,
        };
        if !agrees {
            let label = format!("{} / {} / {options}", case["template"], case["conversation"]);
            let wanted = case["expected"].as_str().unwrap_or_else(|| case["error"].as_str().unwrap());
            wrong.push(format!("{label}\n--- transformers\n{wanted}\n--- here\n{rendered:?}"));
        }
    }
    let count = wrong.len();
    assert!(wrong.is_empty(), "{count} renderings differ; the first:\n{}", wrong[0]);
}

#[test]
fn a_refusal_carries_the_words_of_the_template() {
    let error = render("{{ raise_exception('no ' ~ messages[0].role) }}", &[user("x")]).unwrap_err();
    assert_eq!(error, TextError::TemplateRefused { message: "no user".into() });
    let in_macro = "{% macro f() %}{{ raise_exception('deep') }}{% endmacro %}{{ f() }}";
    assert_eq!(
        render(in_macro, &[user("x")]).unwrap_err(),
        TextError::TemplateRefused { message: "deep".into() }
    );
}

#[test]
fn a_fault_names_the_line_and_is_no_refusal() {
    let error = render("\n\n{{ messages[0].absent.deeper }}", &[user("x")]).unwrap_err();
    let TextError::TemplateRender { reason } = &error else { panic!("{error}") };
    assert!(reason.contains("chat_template:3"), "{reason}");
    let syntax = ChatTemplate::new("{% if %}", None, None).unwrap_err();
    assert!(matches!(syntax, TextError::TemplateSyntax { .. }) && !syntax.is_request_fault());
}

#[test]
fn a_model_without_a_template_has_none() {
    assert!(ChatTemplate::from_files(None, None).unwrap().is_none());
    assert!(ChatTemplate::from_files(Some(br#"{"bos_token": "<s>"}"#), None).unwrap().is_none());
}

#[test]
fn the_file_goes_before_the_config_and_tool_use_is_for_tools() {
    let config = json!({
        "bos_token": {"content": "<s>"},
        "eos_token": null,
        "chat_template": [
            {"name": "default", "template": "plain {{ bos_token }}{{ eos_token is defined }}"},
            {"name": "tool_use", "template": "tools {{ tools|length }}"},
        ],
    });
    let config = serde_json::to_vec(&config).unwrap();
    let messages = [user("x")];
    let plain = ChatInput { messages: &messages, ..ChatInput::default() };
    let with_tools = ChatInput { tools: Some(&[]), ..plain };
    let named = ChatTemplate::from_files(Some(&config), None).unwrap().unwrap();
    assert!(named.supports_tools());
    assert_eq!(named.render(&plain).unwrap(), "plain <s>False");
    assert_eq!(named.render(&with_tools).unwrap(), "tools 0");
    let from_file = ChatTemplate::from_files(Some(&config), Some("file {{ bos_token }}")).unwrap().unwrap();
    assert_eq!(from_file.render(&with_tools).unwrap(), "file <s>");
    assert!(!from_file.supports_tools());
}

#[test]
fn named_templates_need_a_default() {
    let config = br#"{"chat_template": [{"name": "rag", "template": "x"}]}"#;
    let error = ChatTemplate::from_files(Some(config), None).unwrap_err();
    assert_eq!(error, TextError::NoDefaultTemplate { names: vec!["rag".into()] });
    for malformed in
        [&br#"{"chat_template": 3}"#[..], br#"{"chat_template": [{"name": "x"}]}"#, b"[]", b"nonsense"]
    {
        assert!(matches!(
            ChatTemplate::from_files(Some(malformed), None),
            Err(TextError::TokenizerConfig { .. })
        ));
    }
}

#[test]
fn inputs_of_the_wrong_shape_are_refused_by_name() {
    let template = compile("{{ messages }}");
    let refused = |input: ChatInput| template.render(&input).unwrap_err().to_string();
    let messages = [user("x")];
    let good = ChatInput { messages: &messages, ..ChatInput::default() };
    assert_eq!(refused(ChatInput::default()), "messages must be a list of at least one message");
    assert_eq!(
        refused(ChatInput { messages: &[user("x"), json!(3)], ..good }),
        "messages[1] must be a JSON object"
    );
    assert_eq!(refused(ChatInput { tools: Some(&[json!("x")]), ..good }), "tools[0] must be a JSON object");
    assert_eq!(
        refused(ChatInput { documents: Some(&[json!([])]), ..good }),
        "documents[0] must be a JSON object"
    );
    let extra = json!({"messages": []});
    let error = refused(ChatInput { extra: extra.as_object().unwrap(), ..good });
    assert!(error.starts_with("chat_template_kwargs.messages must be left out"), "{error}");
}

#[test]
fn extra_variables_go_over_special_tokens() {
    let extra = json!({"bos_token": "<other>", "enable_thinking": false});
    let messages = [user("x")];
    let input = ChatInput { messages: &messages, extra: extra.as_object().unwrap(), ..ChatInput::default() };
    assert_eq!(
        compile("{{ bos_token }}{{ eos_token }}{{ enable_thinking }}").render(&input).unwrap(),
        "<other></s>False"
    );
}

#[test]
fn a_schema_key_named_items_does_not_hide_the_method() {
    let messages = [json!({"role": "user", "items": 1, "get": 2})];
    let source = "{% for k, v in messages[0].items() %}{{ k }}={{ v }} {% endfor %}{{ messages[0].get('items') }}{{ messages[0]['get'] }}";
    assert_eq!(render(source, &messages).unwrap(), "role=user items=1 get=2 12");
}

#[test]
fn generation_marks_are_only_a_scope() {
    let source = "{%- generation -%} {% set x = 1 %}{{ x }} {%- endgeneration -%}{{ x is defined }}";
    assert_eq!(render(source, &[user("x")]).unwrap(), "1False");
}

#[test]
fn the_clock_is_read_once_per_rendering_and_is_utc() {
    let messages = [user("x")];
    let input = ChatInput { messages: &messages, ..ChatInput::default() };
    let template = compile("{{ strftime_now('%d %b %Y %H:%M:%S %A %j %p %I %y %m %B') }}");
    assert_eq!(
        template.render_at(&input, 951_782_399).unwrap(),
        "28 Feb 2000 23:59:59 Monday 059 PM 11 00 02 February"
    );
    assert!(template.render_at(&input, i64::MAX).is_err());
}
