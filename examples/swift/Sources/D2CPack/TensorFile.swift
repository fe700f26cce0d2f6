/// A safetensors file whose header fits the file; no numbers are read before they are asked for.
///
/// Source: https://github.com/huggingface/safetensors.
struct TensorFile {
    struct Entry {
        let dtype: String
        let shape: [Int]
        let start: Int
        let nBytes: Int
    }

    static let mostTensors = 20_000
    static let mostHeader = 16 << 20
    static let itemSizes = ["F16": 2, "BF16": 2, "F32": 4, "U32": 4, "U8": 1]

    let file: PackFile
    private(set) var tensors: [String: Entry] = [:]
    private(set) var metadata: [String: JSON] = [:]

    init(_ file: PackFile) throws {
        self.file = file
        do {
            try readHeader()
        } catch let error as PackError {
            throw PackError("\(shown(file.path, most: .max)): truncated or not a safetensors file (\(error))")
        }
    }

    private mutating func readHeader() throws {
        let length = try file.read(at: 0, count: 8).reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard length <= Self.mostHeader else { throw PackError("a header of \(length) bytes") }
        let text = try file.read(at: 8, count: Int(length))
        guard text.first == UInt8(ascii: "{"), var entries = try JSON.parse(text).object else {
            throw PackError("the header is no object")
        }
        if let about = entries.removeValue(forKey: "__metadata__") {
            guard let found = about.object, found.values.allSatisfy({ $0.string != nil }) else {
                throw PackError("metadata that is no text")
            }
            metadata = found
        }
        guard entries.count <= Self.mostTensors else { throw PackError("\(entries.count) tensors") }
        let first = 8 + text.count
        for (name, one) in entries { tensors[name] = try Self.entry(one.object ?? [:], name, first) }
        var end = first
        // The tensors follow each other without gaps and fill the file.
        for one in tensors.values.sorted(by: { ($0.start, $0.nBytes) < ($1.start, $1.nBytes) }) {
            guard one.start == end, one.nBytes <= file.size - end else {
                throw PackError("tensors that overlap or leave the file")
            }
            end += one.nBytes
        }
        guard end == file.size else { throw PackError("\(file.size - end) bytes of no tensor") }
    }

    private static func entry(_ one: [String: JSON], _ name: String, _ first: Int) throws -> Entry {
        let offsets = one["data_offsets"]?.array?.compactMap(\.int) ?? []
        guard let dtype = one["dtype"]?.string, let size = itemSizes[dtype],
            let sides = one["shape"]?.array, offsets.count == 2,
            one["data_offsets"]?.array?.count == 2
        else { throw PackError("the tensor \(shown(name)) has no dtype, shape or place that is known") }
        var nBytes = size
        for side in sides {
            let (product, over) = nBytes.multipliedReportingOverflow(by: side.int ?? -1)
            guard !over, product >= 0, side.int ?? -1 >= 0 else {
                throw PackError("the tensor \(shown(name)) has no shape")
            }
            nBytes = product
        }
        let (start, over) = offsets[0].addingReportingOverflow(first)
        guard !over, offsets[0] >= 0, offsets[1] >= offsets[0], offsets[1] - offsets[0] == nBytes else {
            throw PackError("the tensor \(shown(name)) does not have the bytes of its shape")
        }
        return Entry(dtype: dtype, shape: sides.compactMap(\.int), start: start, nBytes: nBytes)
    }

    /// Rows of a tensor, which are the rows of its first side.
    func read(_ entry: Entry, rows: Range<Int>? = nil) throws -> [UInt8] {
        guard let rows, let side = entry.shape.first, side > 0 else {
            return try file.read(at: entry.start, count: entry.nBytes)
        }
        let width = entry.nBytes / side
        return try file.read(at: entry.start + rows.lowerBound * width, count: rows.count * width)
    }
}
