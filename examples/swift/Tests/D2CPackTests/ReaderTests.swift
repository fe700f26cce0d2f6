import XCTest

@testable import D2CPack

final class ReaderTests: XCTestCase {
    private func plainHash(_ bytes: [UInt8], by step: Int = .max) -> String {
        var hash = PlainSHA256()
        var start = 0
        while start < bytes.count {
            let end = start + min(step, bytes.count - start)
            bytes[start..<end].withUnsafeBytes { hash.update(bufferPointer: $0) }
            start = end
        }
        return hash.finalize().map { String(format: "%02x", $0) }.joined()
    }

    /// FIPS 180-4's examples, https://csrc.nist.gov/projects/cryptographic-standards-and-guidelines.
    func testSHA256() {
        let known = [
            "": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq":
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
            String(repeating: "a", count: 1_000_000):
                "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
        ]
        for (text, hash) in known {
            for step in [.max, 64, 63, 7] { XCTAssertEqual(plainHash(Array(text.utf8), by: step), hash) }
        }
    }

    func testJSON() throws {
        let text = #" {"a": [1, -2.5e1, null, true, "ä\ud83d\ude00\n"], "b": {}, "c": 18446744073709551615} "#
        XCTAssertEqual(
            try JSON.parse(Array(text.utf8)),
            .object([
                "a": .array([.int(1), .number(-25), .null, .bool(true), .string("ä😀\n")]),
                "b": .object([:]), "c": .number(18_446_744_073_709_551_615),
            ]))
        let deep = String(repeating: "[", count: 100_000)
        for bad in [
            "", "{", "nul", "NaN", "-", "01", "1.", "1e999", "18446744073709551616", "+1", "[1,]", "{} {}",
            #"{"a": 1, "a": 2}"#, #""\ud800""#, #""\udc00\ud800""#, #""\ud800\u0041""#, #""\x""#, #""\u12"#,
            "\"\n\"", "'a'", "{1: 2}", deep, "\u{FEFF}{}",
        ] { XCTAssertThrowsError(try JSON.parse(Array(bad.utf8)), bad) }
        XCTAssertThrowsError(try JSON.parse([0x22, 0xFF, 0x22]))
    }

    func testNames() throws {
        for good in ["a", "cluster-0/adapters.safetensors", "ä b", "...", "a..b"] {
            XCTAssertTrue(isInside(good, depth: 2), good)
        }
        for bad in [
            "", ".", "..", "/", "/a", "a/", "a//b", "../a", "a/..", "a/b/c", "a\0", "a\u{202E}b", "a\u{A0}b",
            "..\u{338}/..", "a/\u{338}../b", String(repeating: "a", count: 256),
        ] { XCTAssertFalse(isInside(bad, depth: 2), bad) }
        // The slash that a letter's accent hides from String.
        XCTAssertFalse(isInside("x/\u{338}", depth: 1))
        let path = try ModulePath("language_model.layers.12.mlp.up_proj")
        XCTAssertEqual([path.blocks, "\(path.block)", path.key], ["language_model.layers", "12", "mlp.up_proj"])
        for bad in ["lm_head", "layers.x.y", "layers.1", "layers.1.", "a.layers.-1.b", "layers.99999999999999999999.a"] {
            XCTAssertThrowsError(try ModulePath(bad), bad)
        }
    }

    /// Codes of 3 bits cross bytes; the last group is not full.
    func testRows() {
        let codes = (0..<32).map { UInt32($0 % 8) }
        var bytes = [UInt8](repeating: 0, count: 12)
        for (i, code) in codes.enumerated() {
            for bit in 0..<3 where code >> bit & 1 == 1 { bytes[(3 * i + bit) / 8] |= 1 << ((3 * i + bit) % 8) }
        }
        let half = { (x: Float16) in [UInt8(x.bitPattern & 255), UInt8(x.bitPattern >> 8)] }
        var stack = RowStack(
            kind: .init(bits: 3, width: 30), groupSize: 32, parts: [bytes, half(0.5), half(-1)])
        XCTAssertEqual(stack.next(), codes.prefix(30).map { 0.5 * Float16($0) - 1 })
    }
}
