/// A JSON value. Foundation's parser takes a key twice and does not tell `true` from 1.
///
/// Source: RFC 8259, https://www.rfc-editor.org/rfc/rfc8259.
enum JSON: Equatable {
    case null, bool(Bool), int(Int), number(Double), string(String)
    case array([JSON]), object([String: JSON])

    var object: [String: JSON]? { if case .object(let found) = self { return found } else { return nil } }
    var array: [JSON]? { if case .array(let found) = self { return found } else { return nil } }
    var string: String? { if case .string(let found) = self { return found } else { return nil } }
    var int: Int? { if case .int(let found) = self { return found } else { return nil } }
    var double: Double? {
        switch self {
        case .int(let found): return Double(found)
        case .number(let found): return found
        default: return nil
        }
    }

    /// Parse UTF-8 text; throws PackError for what is no JSON, NaN, numbers beyond 64 bits, a key
    /// that is there twice, halves of surrogate pairs, and more values or levels than any pack has.
    static func parse(_ bytes: [UInt8]) throws -> JSON {
        guard Array(String(decoding: bytes, as: UTF8.self).utf8) == bytes else {
            throw PackError("not UTF-8")
        }
        var parser = Parser(bytes: bytes)
        let value = try parser.value(level: 0)
        parser.skipSpace()
        guard parser.at == bytes.count else { throw parser.error("more text after the value") }
        return value
    }
}

private struct Parser {
    static let mostLevels = 64
    static let mostValues = 1 << 20

    let bytes: [UInt8]
    var at = 0
    var nValues = 0

    /// The byte at the position; 0, which no JSON has, at the end.
    var next: UInt8 { at < bytes.count ? bytes[at] : 0 }

    func error(_ what: String) -> PackError { PackError("not readable as JSON (\(what) at byte \(at))") }

    mutating func skipSpace() {
        while next == 0x20 || next == 0x0A || next == 0x0D || next == 0x09 { at += 1 }
    }

    mutating func take(_ text: StaticString) -> Bool {
        let end = at + text.utf8CodeUnitCount
        guard end <= bytes.count else { return false }
        let same = text.withUTF8Buffer { bytes[at..<end].elementsEqual($0) }
        if same { at = end }
        return same
    }

    mutating func value(level: Int) throws -> JSON {
        nValues += 1
        guard level < Self.mostLevels, nValues < Self.mostValues else { throw error("too deep or large") }
        skipSpace()
        switch next {
        case UInt8(ascii: "{"): return try object(level: level)
        case UInt8(ascii: "["): return try array(level: level)
        case UInt8(ascii: "\""): return .string(try string())
        default: break
        }
        if take("true") { return .bool(true) }
        if take("false") { return .bool(false) }
        if take("null") { return .null }
        return try number()
    }

    mutating func object(level: Int) throws -> JSON {
        var found: [String: JSON] = [:]
        at += 1
        skipSpace()
        if take("}") { return .object(found) }
        repeat {
            skipSpace()
            guard next == UInt8(ascii: "\"") else { throw error("no key") }
            let key = try string()
            skipSpace()
            guard take(":") else { throw error("no colon") }
            let one = try value(level: level + 1)
            guard found.updateValue(one, forKey: key) == nil else { throw error("a key twice") }
            skipSpace()
        } while take(",")
        guard take("}") else { throw error("no end of an object") }
        return .object(found)
    }

    mutating func array(level: Int) throws -> JSON {
        var found: [JSON] = []
        at += 1
        skipSpace()
        if take("]") { return .array(found) }
        repeat {
            found.append(try value(level: level + 1))
            skipSpace()
        } while take(",")
        guard take("]") else { throw error("no end of a list") }
        return .array(found)
    }

    mutating func digits() throws {
        let start = at
        while (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(next) { at += 1 }
        guard at > start else { throw error("no value") }
    }

    mutating func number() throws -> JSON {
        let start = at
        var whole = true
        _ = take("-")
        if !take("0") { try digits() }
        if take(".") {
            whole = false
            try digits()
        }
        if take("e") || take("E") {
            whole = false
            if !take("+") { _ = take("-") }
            try digits()
        }
        let text = String(decoding: bytes[start..<at], as: UTF8.self)
        if whole, let found = Int(text) { return .int(found) }
        // Above the signed ones there are whole numbers of 64 bits, and nothing here is that large.
        guard let found = Double(text), found.isFinite, !whole || UInt64(text) != nil else {
            throw error("a number beyond 64 bits")
        }
        return .number(found)
    }

    mutating func string() throws -> String {
        var found: [UInt8] = []
        at += 1
        while next != UInt8(ascii: "\"") {
            guard next >= 0x20 else { throw error("no end of a string") }
            if next == UInt8(ascii: "\\") {
                at += 1
                found.append(contentsOf: String(try escaped()).utf8)
            } else {
                found.append(next)
                at += 1
            }
        }
        at += 1
        return String(decoding: found, as: UTF8.self)
    }

    mutating func escaped() throws -> Unicode.Scalar {
        defer { at += 1 }
        switch next {
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return Unicode.Scalar(next)
        case UInt8(ascii: "b"): return "\u{08}"
        case UInt8(ascii: "f"): return "\u{0C}"
        case UInt8(ascii: "n"): return "\n"
        case UInt8(ascii: "r"): return "\r"
        case UInt8(ascii: "t"): return "\t"
        case UInt8(ascii: "u"): break
        default: throw error("an unknown escape")
        }
        let high = try unit()
        if let one = Unicode.Scalar(high) { return one }
        guard high < 0xDC00, at + 2 < bytes.count, bytes[at + 1] == UInt8(ascii: "\\"),
            bytes[at + 2] == UInt8(ascii: "u")
        else { throw error("half of a surrogate pair") }
        at += 2
        let low = try unit()
        let both = 0x10000 + ((high - 0xD800) << 10)
        guard (0xDC00..<0xE000).contains(low), let one = Unicode.Scalar(both + low - 0xDC00) else {
            throw error("half of a surrogate pair")
        }
        return one
    }

    /// Four hexadecimal digits after the position, which then is at the last of them.
    mutating func unit() throws -> UInt32 {
        guard at + 4 < bytes.count else { throw error("no end of a string") }
        var found: UInt32 = 0
        for byte in bytes[at + 1...at + 4] {
            guard let digit = Character(Unicode.Scalar(byte)).hexDigitValue else {
                throw error("an unknown escape")
            }
            found = found << 4 | UInt32(digit)
        }
        at += 4
        return found
    }
}
