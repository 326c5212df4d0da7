//! `openapi.json` says what the handlers do.

use super::*;

/// Checks a value against a schema of the description: types, required and additional properties, enums.
fn conforms(root: &Value, schema: &Value, value: &Value, place: &str) {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = root.pointer(reference.trim_start_matches('#')).unwrap_or_else(|| panic!("{reference}"));
        return conforms(root, target, value, place);
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        let choice = if value.is_null() { &choices[1] } else { &choices[0] };
        return conforms(root, choice, value, place);
    }
    let types = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        other => panic!("{place}: the schema has the type {other}"),
    };
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    assert!(
        types.contains(&found) || found == "integer" && types.contains(&"number"),
        "{place}: {value} is no {types:?}"
    );
    if let Some(allowed) = schema["enum"].as_array() {
        assert!(allowed.contains(value), "{place}: {value} is none of {allowed:?}");
    }
    if let Value::Array(elements) = value {
        for element in elements {
            conforms(root, &schema["items"], element, place);
        }
    }
    if let (Value::Object(fields), Some(properties)) = (value, schema["properties"].as_object()) {
        for required in schema["required"].as_array().unwrap() {
            assert!(fields.contains_key(required.as_str().unwrap()), "{place} lacks {required}");
        }
        for (name, field) in fields {
            let schema = properties.get(name).unwrap_or_else(|| panic!("{place}.{name} is not described"));
            conforms(root, schema, field, &format!("{place}.{name}"));
        }
    }
}

/// The schema of an answer, if it is JSON.
fn schema<'d>(description: &'d Value, path: &str, method: &str, status: u16) -> Option<&'d Value> {
    let response = &description["paths"][path][method]["responses"][status.to_string()];
    assert!(response.is_object(), "{method} {path} answers {status}, which is not described");
    let response = match response["$ref"].as_str() {
        Some(reference) => description.pointer(reference.trim_start_matches('#')).unwrap(),
        None => response,
    };
    let content = response["content"].as_object().unwrap();
    ["application/json", "application/problem+json"]
        .iter()
        .find_map(|kind| Some(&content.get(*kind)?["schema"]))
}

#[tokio::test]
async fn every_described_route_answers_as_described() {
    let server = Server::new(Play::Commit).await;
    let description = server.get("/openapi.json").await.json();
    assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
    let body = |path: &str| match path.rsplit('/').next().unwrap() {
        "hold" => hold().to_string(),
        "flip" => json!({"generation": 2, "to": "fra"}).to_string(),
        "reload" => json!({"check": false}).to_string(),
        "resolve" => json!({"as": "committed"}).to_string(),
        "resume" => json!({"generation": 1}).to_string(),
        "migrations" => json!({"backend": "chat-1", "to": "fra"}).to_string(),
        _ => String::new(),
    };
    // A finished migration to look at; then the same requests find things as they are, and as they are not.
    let id =
        server.post("/v1/migrations", json!({"backend": "chat-1", "to": "fra"})).await.json()["id"].clone();
    server.finished(&id).await;
    let mut seen = 0;
    for name in ["chat-1", "nobody"] {
        let id = if name == "nobody" { "m-0" } else { id.as_str().unwrap() };
        for (path, methods) in description["paths"].as_object().unwrap() {
            for method in methods.as_object().unwrap().keys().filter(|key| *key != "parameters") {
                let mut real = path.replace("{name}", name).replace("{id}", id);
                if path == "/v1/capture" {
                    // One that is refused: others end when nobody reads them any more.
                    real += "?reason=none";
                }
                let verb: Method = method.to_uppercase().parse().unwrap();
                let answer = server.send(verb, &real, body(path)).await;
                assert!(
                    !answer.text.contains("unknown-route") && !answer.text.contains("wrong-method"),
                    "{method} {path} is described and not there"
                );
                if let Some(schema) = schema(&description, path, method, answer.status) {
                    conforms(&description, schema, &answer.json(), path);
                }
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 2 * 22, "a route came or went: see to its description");
}

#[tokio::test]
async fn described_requests_are_the_ones_that_are_taken() {
    let server = Server::new(Play::Commit).await;
    let description = server.get("/openapi.json").await.json();
    for (path, request) in [
        ("/v1/backends/nobody/hold", "HoldRequest"),
        ("/v1/backends/nobody/flip", "FlipRequest"),
        ("/v1/backends/nobody/resume", "ResumeRequest"),
        ("/v1/migrations", "MigrationRequest"),
        ("/v1/migrations/m-0/resolve", "ResolveRequest"),
        ("/v1/reload", "ReloadRequest"),
    ] {
        let schema = &description["components"]["schemas"][request];
        // The error for an unknown field lists the known ones.
        let detail =
            server.post(path, json!({"colour": 1})).await.json()["detail"].as_str().unwrap().to_owned();
        for name in schema["properties"].as_object().unwrap().keys() {
            assert!(
                detail.contains(&format!("`{name}`")),
                "{request}.{name} is described and not taken: {detail}"
            );
        }
        let known = detail.matches('`').count() / 2 - 1;
        assert_eq!(known, schema["properties"].as_object().unwrap().len(), "{request}: {detail}");
        // Each required field is missed.
        let all = json!({"generation": 1, "to": "fra", "backend": "nobody"});
        for required in schema["required"].as_array().unwrap() {
            let mut fields = all.as_object().unwrap().clone();
            fields.retain(|name, _| schema["properties"].get(name).is_some() && name != required);
            let answer = server.post(path, Value::Object(fields)).await;
            assert!(answer.text.contains("missing field"), "{request}: {}", answer.text);
        }
    }
}
